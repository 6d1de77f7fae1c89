"""`reheat convert --push`: a converted folder goes to the Hugging Face Hub, with what could go wrong asked before the work."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_reheat.errors import ConfigError, ReheatError
from megatron_reheat.model.card_usage import renamed
from megatron_reheat.model.provider import FILE_SUFFIXES, hub_answers

CARD = "README.md"
LOG_IN = "`hf auth login`, or set HF_TOKEN"


@dataclass(frozen=True)
class Push:
    """Where to: `repository` is USER/NAME, `revision` a branch of it, None for its main one."""

    repository: str
    private: bool = False
    revision: str | None = None

    def check(self) -> None:
        """What can be known before anything is converted.

        Raises:
            ConfigError: the upload would be refused.
        """
        from huggingface_hub import HfApi, constants, get_token
        from huggingface_hub.utils import HFValidationError, validate_repo_id

        repository = self.repository
        try:
            validate_repo_id(repository)
        except HFValidationError as error:
            raise ConfigError(f"--push {repository}: {str(error).rstrip('.')}; give USER/NAME") from None
        if repository.count("/") != 1:
            raise ConfigError(f"--push {repository} does not say whose it is; give USER/NAME")
        if self.revision is not None and not re.fullmatch(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)*", self.revision):
            raise ConfigError(
                f"--revision {self.revision!r} is no name of a branch; use letters, digits, '-', '_' and '.'"
            )
        if constants.HF_HUB_OFFLINE:
            raise ConfigError("--push: HF_HUB_OFFLINE is set, so nothing can be sent; unset it")
        if get_token() is None:
            raise ConfigError(f"--push: there is no token for {constants.ENDPOINT}; log in with {LOG_IN}")
        if not hub_answers():
            raise ConfigError(f"--push: {constants.ENDPOINT} does not answer; try again, or convert without --push")
        api = HfApi()
        try:
            self._check_rights(api.whoami())
            if self.private and api.repo_exists(repository) and not api.model_info(repository).private:
                raise ConfigError(
                    f"--private: {repository} is there already and public; make it private in its settings, or leave "
                    "--private out"
                )
        except ConfigError:
            raise
        except Exception as error:  # the hub client raises many kinds
            raise ConfigError(f"--push {repository}: {_explain(error, repository)}") from None

    def _check_rights(self, account: dict[str, Any]) -> None:
        owner, user = self.repository.split("/")[0], account.get("name")
        token = (account.get("auth") or {}).get("accessToken") or {}
        if token.get("role") == "read":
            raise ConfigError(f"--push: the token may only read; make one that may write, and log in with {LOG_IN}")
        if owner not in (user, *(org.get("name") for org in account.get("orgs") or ())):
            raise ConfigError(
                f"--push {self.repository}: the token is {user}'s, who may not write for {owner}; push to {user}/..., or log "
                f"in as another with {LOG_IN}"
            )

    def upload(self, folder: Path) -> str:
        """Sends a converted folder's own files, nothing else that lies there; returns one sentence about it.

        Raises:
            ReheatError: it is not such a folder, or the hub refuses it. The folder stays.
        """
        from huggingface_hub import HfApi

        names = converted_files(folder)
        message = commit_message(folder)
        _name_in_card(folder, self.repository)
        api, repository = HfApi(), self.repository
        try:
            url = api.create_repo(repository, private=self.private or None, exist_ok=True)
            if self.revision is not None:
                api.create_branch(repository, branch=self.revision, exist_ok=True)
            api.upload_folder(
                repo_id=repository,
                folder_path=folder,
                allow_patterns=names,
                revision=self.revision,
                commit_message=message,
            )
        except Exception as error:  # the hub client raises many kinds
            private = " --private" if self.private else ""
            revision = "" if self.revision is None else f" --revision {self.revision}"
            raise ReheatError(
                f"{folder} was not uploaded: {_explain(error, repository)}; the folder is complete: try again with reheat "
                f"convert --converted {folder} --push {repository}{private}{revision}"
            ) from None
        branch = "" if self.revision is None else f", branch {self.revision}"
        return f"{url}{branch}: {len(names)} files, as {message!r}"


def converted_files(folder: Path) -> list[str]:
    """The names of a Hugging Face folder's own files.

    Raises:
        ConfigError: it is none.
    """
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"{folder} is no converted model, which has a config.json and *.safetensors; make one with --to-hf"
        )
    own = (path for path in folder.iterdir() if path.suffix in FILE_SUFFIXES or path.name == CARD)
    return sorted(path.name for path in own if path.is_file())


def commit_message(folder: Path) -> str:
    """`step 120`, as the card says."""
    card = folder / CARD
    found = re.search(r"^# .*, (step \d+)$", card.read_text(), re.MULTILINE) if card.is_file() else None
    return found[1] if found else f"upload {folder.resolve().name}"


def _name_in_card(folder: Path, repository: str) -> None:
    """Its programs load the model from where it is published."""
    card = folder / CARD
    if card.is_file() and (text := renamed(old := card.read_text(), folder.resolve().name, repository)) != old:
        card.write_text(text)


def _explain(error: Exception, repository: str) -> str:
    """The hub client says it in several lines, with addresses and request ids."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return f"the hub does not accept the token (401); log in again with {LOG_IN}"
    if status == 403:
        return f"the token may not write to {repository} (403); log in with one that may, by {LOG_IN}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if status and lines else ''.join(lines[:1])}"
