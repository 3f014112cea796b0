"""What a name on the Hugging Face hub stands for at the moment."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi, constants
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import HFValidationError, get_session, validate_repo_id

_SECONDS = 5


def is_name(text: str) -> bool:
    """Whether a repository can have this name."""
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True


@functools.cache
def answers() -> bool:
    """Whether the hub can be reached."""
    try:
        get_session().head(constants.ENDPOINT, timeout=_SECONDS)
    except Exception:  # whatever the client raises, a proxy or a missing network among the reasons
        return False
    return True


@functools.cache
def commit(kind: Literal["model", "dataset"], name: str, revision: str | None) -> str:
    """The commit of a repository that ``revision``, by default its main branch, stands for.

    Without an answer it is the one that was downloaded last, and where there is none, the revision as it was given.
    """
    wanted = revision or "main"
    if re.fullmatch("[0-9a-f]{40}", wanted):
        return wanted
    if answers():
        try:
            found = HfApi().repo_info(name, repo_type=kind, revision=wanted, timeout=_SECONDS).sha
        except Exception:  # not there, or not for us: loading it will say so
            found = None
        if found:
            return found
    reference = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type=kind) / "refs" / wanted
    return reference.read_text().strip() if reference.is_file() else wanted
