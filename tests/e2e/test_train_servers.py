"""Whole runs that sample from vLLM servers: the same steps as with embedded engines, and one step off-policy."""

from __future__ import annotations

import re
import urllib.error
import urllib.request

import psutil
import pytest

from megatron_reheat.confidential import TOKEN_VARIABLE
from megatron_reheat.model.checkpoint import read_state
from tests.e2e import runs

SHORT = ["run.steps=4", "eval.data="]
SERVERS = ["rollout.mode=server", *SHORT]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("train")
    return runs.write_recipe(runs.recipe(runs.make_policy_folder(root / "model"), root), root / "recipe.yaml")


def test_two_servers_shared_by_two_replicas_train_the_same_policy(config):
    """The samples are the embedded engines', so every step is; also of a run in which a server dies."""
    runs.train(config, "run.name=embedded", *SHORT)
    expected = trained_steps(config.parent / "embedded")

    folder = config.parent / "servers"
    process = runs.start("train", str(config), "run.name=servers", "rollout.num_servers=2", *SERVERS)
    try:
        runs.wait_for(lambda: len(trained_steps(folder)) > 0, process)
        started = psutil.Process(process.pid).children(recursive=True)
        secrets = {token_of(server) for server in started if "--middleware" in server.cmdline()}
        next(p for p in started if "EngineCore" in p.name()).kill()
        output, errors = process.communicate(timeout=runs.LIMIT_S)
    finally:
        if process.poll() is None:
            runs.kill(process)
    assert process.returncode == 0, output[-1000:] + errors[-3000:]
    assert "2 server(s)" in output and "digests verified" in output
    (secret,) = secrets
    texts = [output, errors, *(path.read_text(errors="replace") for path in folder.rglob("*") if path.is_file())]
    assert len(texts) > 8 and not any(secret in text for text in texts)
    steps = trained_steps(folder)
    assert (steps[0]["rollout/engine_restarts"], steps[-1]["rollout/engine_restarts"]) == (0.0, 1.0)
    assert [s["step"] for s in steps] == [s["step"] for s in expected]
    for ours, theirs in zip(steps, expected, strict=True):
        same = {
            name: value
            for name, value in runs.numbers_of(theirs).items()
            if isinstance(value, float) and not name.startswith(("rollout/mismatch", "rollout/engine"))
        }
        assert ours["stage"] == theirs["stage"] and len(same) > 10
        assert {name: ours[name] for name in same} == pytest.approx(same, rel=1e-5)


def test_sampling_ahead_is_one_step_off_policy_and_loses_no_prompt(config):
    """The first RL step is on-policy, the others train on what the policy before them sampled, with the same seeds."""
    overlap = ["rollout.overlap=true", "rl.tis_cap=2.0", "parallel.data=1", "controller.action=none"]
    overlap += ["rl.entropy_coef=1.0"]  # a gradient even where no answer is right
    overlap += ["rl.method=gspo", "rl.aggregation=sequence_mean"]  # which corrects a response as a whole
    runs.train(config, "run.name=ahead", *overlap, *SERVERS)
    steps = trained_steps(config.parent / "ahead")
    assert [s["rollout/staleness"] for s in steps] == [0.0, 1.0, 1.0, 1.0]
    assert steps[0]["rollout/mismatch_kl"] < 1e-6
    # what the weights moved by in one update is what the two policies differ by
    assert all(1e-8 < s["rollout/mismatch_kl"] < 0.1 for s in steps[1:])
    # prompts that are sampled ahead count as drawn only when they are trained on
    drawn = {
        f.name: read_state(f)["cursor"]["position"] for f in (config.parent / "ahead" / "checkpoints").glob("step-*")
    }
    assert drawn == {"step-8": 12, "step-9": 18, "step-10": 24}


def token_of(server):
    """The run's own, which others on this machine do not have: they are answered by nothing but /health."""
    port = re.search(r"--port (\d+)", " ".join(server.cmdline()))[1]
    token = server.environ()[TOKEN_VARIABLE]
    request = urllib.request.Request(f"http://127.0.0.1:{port}/version")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request)
    assert refused.value.code == 401
    assert not any(token in " ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"]))
    return token


def trained_steps(folder):
    return [s for s in runs.steps_of(folder) if s["stage"] != "sft"]
