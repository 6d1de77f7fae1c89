"""What a batch job has besides the trainer when the vLLM servers get nodes of their own: text for the job's template."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_reheat.cluster.template import JobTemplate
from megatron_reheat.confidential import TOKEN_VARIABLE

# servers that were asked to end need a few seconds to remove their shared memory
GRACE_S = 30

TEXTS = {
    "rollout_nodes": """
# The nodes of the vLLM servers.
#SBATCH hetjob
@@{directives}""",
    "start_servers": """
# vLLM servers on the nodes of the second part; what they print is in $logs/rollout-N.log and $logs/vllm-*.log. The SIGTERM of
# scancel reaches all nodes: they ignore it, because the trainer may need them until it has saved.
# A secret of this job, for the servers and the trainer; srun hands it on with the environment, and nothing writes it down.
export @@{token}=${@@{token}:-$(head -c 24 /dev/urandom | od -An -v -tx1 | tr -d ' \\n')}
servers=''
for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST_HET_GROUP_1"); do
    for ((k = 1; k <= @@{servers_per_node}; k++)); do servers+=${servers:+,}http://$node:$((port + k)); done
done
srun --het-group=1 --kill-on-bad-exit=1 --cpu-bind=none --open-mode=append --output="$logs/rollout-%n.log"@@{srun_options} \\
    bash -c 'trap "" TERM; exec "$@"' serve \\
    @@{python} -m megatron_reheat serve "${run[@]}" --host 0.0.0.0 --servers @@{servers_per_node} \\
    --port $((port + 1)) --log-folder "$logs" &
serving=$!
run+=("rollout.servers=[$servers]")
""",
    "end_servers": """
# SIGINT ends the servers in order, where srun would kill them; what is left, and a cancelled job's servers, Slurm ends.
if [ -z "$cancelled" ] && scancel --signal=INT "$SLURM_JOB_ID_HET_GROUP_1"; then
    for ((s = 0; s < @@{grace_s}; s++)); do kill -0 "$serving" 2>/dev/null || break; sleep 1; done
fi
""",
}


def rollout_texts(
    directives: Sequence[str], servers_per_node: int, *, python: str, srun_options: str
) -> dict[str, str]:
    """The job template's placeholders that are empty in a job without such nodes.

    Args:
        directives: sbatch's options for these nodes, without dashes.
        python: the command that runs Python there.
        srun_options: further options of srun, with a leading space, or nothing.
    """
    values = {
        "directives": "\n".join(f"#SBATCH --{option}" for option in directives),
        "servers_per_node": servers_per_node,
        "python": python,
        "srun_options": srun_options,
        "grace_s": GRACE_S,
        "token": TOKEN_VARIABLE,
    }
    return {name: JobTemplate(text).substitute(values) for name, text in TEXTS.items()}
