"""One folder, one commit: the exchange with the Hub that publishing a checkpoint or a dataset needs."""

import argparse
import re
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError

from uground.hub.weights.weight_files import first_line

REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
KINDS = ("models", "datasets", "spaces", "model", "dataset", "space")
# Of an earlier commit, replaced whole: shards of another split would be read, or downloaded for nothing.
REPLACED = (".safetensors", ".safetensors.index.json", ".parquet")
AGAIN = "run the command again; what has arrived is not sent twice"


def check_repo_id(repo_id: str) -> None:
    """Raise a `ValueError` unless this is `USER/NAME`, and no address of a dataset or Space."""
    if repo_id.split("/")[0] in KINDS and repo_id.count("/") == 2:
        raise ValueError(
            f"--repo-id must be USER/NAME, got {repo_id!r}: the kind of repository follows from what is published"
        )
    if not REPO_ID.fullmatch(repo_id) or ".." in repo_id or "--" in repo_id:
        raise ValueError(f"--repo-id must be USER/NAME in letters, digits, '-', '_' and '.', got {repo_id!r}")


def require_token() -> str:
    """
    The user's token.

    Raises:
        OSError: there is none.
    """
    token = get_token()
    if token is None:
        raise PermissionError("there is no token for the Hub: run `hf auth login`, or set HF_TOKEN")
    return token


def commit_files(
    folder: Path, repo_id: str, token: str, message: str, private: bool = False, repo_type: str = "model"
) -> str:
    """
    Make the repository if need be, and put all files of a folder there in one commit.

    Large files that the Hub knows already are not sent. Weights and tables of an earlier commit that are not in the
    folder are removed in the same commit. If another commit came in between, none is made.

    Returns:
        Address of the commit; of the last one if nothing has changed.

    Raises:
        OSError: the Hub refuses or the connection is lost; the repository is as it was, unless the connection was lost
            while it answered. No error holds the token.
    """
    api = HfApi(token=token, library_name="uground")
    try:
        api.create_repo(repo_id, private=private or None, repo_type=repo_type, exist_ok=True)
        info = api.repo_info(repo_id, repo_type=repo_type)
        if private and not info.private:
            raise PermissionError(
                f"{repo_id} exists already and is public: make it private on the Hub, or leave --private"
            )
        return api.create_commit(
            repo_id,
            _operations(folder, [entry.rfilename for entry in info.siblings or []]),
            commit_message=message,
            repo_type=repo_type,
            parent_commit=info.sha,
        ).commit_url
    except HfHubHTTPError as error:
        raise OSError(_explain(error, repo_id, repo_type)) from error
    except OSError:
        raise
    except ValueError as error:
        raise ValueError(f"the Hub refuses what would be published: {' '.join(str(error).split())}") from error
    except Exception as error:  # the HTTP library and the upload threads have errors of their own
        cause = error.__cause__ or error
        if isinstance(cause, HfHubHTTPError):
            raise OSError(_explain(cause, repo_id, repo_type)) from error
        reason = f"{type(cause).__name__}: {first_line(cause)}"
        raise ConnectionError(f"the connection to the Hub was lost ({reason}); {AGAIN}") from error


def _operations(folder: Path, present: list[str]) -> list:
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    stale = [name for name in present if name.endswith(REPLACED) and name not in files]
    return [CommitOperationDelete(name) for name in stale] + [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(path)) for name, path in files.items()
    ]


def _explain(error: HfHubHTTPError, repo_id: str, repo_type: str) -> str:
    status = error.response.status_code
    said = error.server_message or first_line(error)
    if status == 401:
        return "the Hub does not know this token: run `hf auth login` again, or mend HF_TOKEN"
    if status == 403:
        return f"this token may not write to the {repo_type} {repo_id} ({said})"
    if status in (409, 412):
        return f"somebody else changed the {repo_type} {repo_id}, and nothing was committed ({said}); {AGAIN}"
    return f"the Hub answered {status} ({said}); {AGAIN}"


def add_repository_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags for where a commit goes, shared by the commands that make one."""
    parser.add_argument("--repo-id", required=True, metavar="USER/NAME", help="repository, made if it is not there")
    parser.add_argument("--private", action="store_true", help="make it a private repository")
    parser.add_argument("--dry-run", action="store_true", help="list files, sizes and the card; no network")
