"""A Hub on 127.0.0.1: enough of its HTTP protocol for the real client to create, push to and load repositories.

Repositories live in memory as a line of commits, each a mapping of paths to files; a commit is made whole or not at
all. `Fault`s break chosen requests, `LoopbackHub.requests` tells what was asked and how many bytes came with it.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import transformers.utils.hub
import yaml
from huggingface_hub import close_session, constants

TOKEN = "hf_loopbackSecretToken"
USER = "someone"
DATE = "2026-01-01T00:00:00.000Z"
LFS_SUFFIXES = (".safetensors", ".png", ".parquet", ".bin", ".pt")
TYPES = {"models": "model", "datasets": "dataset", "spaces": "space"}


@dataclass(frozen=True)
class StoredFile:
    data: bytes
    is_lfs: bool

    @property
    def oid(self) -> str:
        """Git's name of the content, or the SHA-256 of a large file."""
        if self.is_lfs:
            return hashlib.sha256(self.data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()


@dataclass
class Commit:
    oid: str
    title: str
    files: dict[str, StoredFile]


@dataclass
class Repository:
    repo_type: str
    repo_id: str
    private: bool = False
    commits: list[Commit] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        self.commit("main", "initial commit", {})

    def at(self, revision: str) -> Commit | None:
        """The commit of a branch, tag or hash."""
        oid = self.refs.get(revision, revision)
        return next((commit for commit in self.commits if commit.oid == oid), None)

    def commit(self, branch: str, title: str, files: dict[str, StoredFile]) -> Commit:
        """Put a new commit with exactly these files at the head of a branch."""
        seed = f"{self.repo_type} {self.repo_id} {len(self.commits)} {title}".encode()
        made = Commit(hashlib.sha1(seed).hexdigest(), title, files)
        self.commits.append(made)
        self.refs[branch] = made.oid
        return made

    @property
    def head(self) -> Commit:
        return self.at("main")


@dataclass
class Fault:
    """
    What happens to the next `times` requests whose "METHOD /path" matches: a status, or a lost connection; or, with
    `before`, a call of that, after which the request is answered as ever.
    """

    request: str
    status: int | None = None
    message: str = "broken on purpose"
    times: int = 1
    before: Callable[[], None] | None = None


@dataclass
class Request:
    method: str
    path: str
    num_bytes: int


class LoopbackHub:
    """
    The server; a context manager that yields itself.

    Attributes:
        repositories: `(repo type, repo id)` to `Repository`.
        blobs: SHA-256 to the content of a large file that was uploaded, committed or not.
        requests: every request, in order.
        faults: `Fault`s still to happen.
    """

    def __init__(self):
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "LoopbackHub":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_error) -> None:
        self._server.shutdown()
        self._server.server_close()

    def repository(self, repo_id: str, repo_type: str = "model") -> Repository:
        return self.repositories[repo_type, repo_id]

    def uploads(self) -> list[int]:
        """Sizes of the large files that were sent."""
        return [request.num_bytes for request in self.requests if request.method == "PUT"]

    def environment(self, cache: str) -> dict[str, str]:
        """What a process needs in its environment to take this server for the Hub; `cache` is its home folder."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": cache,
            "HF_MODULES_CACHE": f"{cache}/modules",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    def take_fault(self, request: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.request, request):
                    fault.times -= 1
                    return fault
        return None


@contextmanager
def connected(hub: LoopbackHub, monkeypatch, cache, token: str | None = TOKEN):
    """
    This process uses `hub`, as if the variables of [`LoopbackHub.environment`] had been there when it started: the
    client reads them at import, which has long happened when a test runs. Nothing of the client is replaced.
    """
    with monkeypatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", hub.endpoint)
        patch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
        patch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
        patch.setattr(transformers.utils.hub, "_hf_api", None)
        for name in ("HUGGING_FACE_HUB_TOKEN", "HF_TOKEN"):
            patch.delenv(name, raising=False)
        if token is not None:
            patch.setenv("HF_TOKEN", token)
        yield hub
    close_session()


class _Answer(Exception):
    """A status with a body, raised to end the handling of a request."""

    def __init__(self, status: int, body=None, headers: dict[str, str] | None = None):
        super().__init__(status)
        self.status, self.headers = status, headers or {}
        self.body = body if isinstance(body, bytes) else json.dumps({} if body is None else body).encode()


def _error(status: int, message: str, code: str | None = None) -> _Answer:
    headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
    return _Answer(status, {"error": message}, headers)


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"
    # (method, path, name of the method that answers); named groups are handed to it.
    repo = r"(?P<kind>models|datasets|spaces)/(?P<repo_id>[^/]+/[^/]+)"
    routes = (
        ("POST", r"/api/repos/create", "create_repository"),
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/validate-yaml", "validate_card"),
        ("POST", rf"/api/{repo}/preupload/(?P<revision>.+)", "preupload"),
        ("POST", rf"/api/{repo}/commit/(?P<revision>.+)", "commit"),
        ("POST", rf"/api/{repo}/branch/(?P<branch>.+)", "create_branch"),
        ("POST", rf"/api/{repo}/tag/(?P<revision>.+)", "create_tag"),
        ("POST", rf"/api/{repo}/paths-info/(?P<revision>.+)", "paths_info"),
        ("GET", rf"/api/{repo}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", "tree"),
        ("GET", rf"/api/{repo}/revision/(?P<revision>.+)", "info"),
        ("GET", rf"/api/{repo}", "info"),
        ("POST", r"/(?:(?P<kind>datasets|spaces)/)?(?P<repo_id>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_upload"),
        ("POST", r"/lfs/verify", "lfs_verify"),
        (
            "GET",
            r"/(?:(?P<kind>datasets|spaces)/)?(?P<repo_id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)",
            "resolve",
        ),
    )

    def log_message(self, *_arguments):
        """Tests keep their output clean; `requests` has the record."""

    def handle_one_request(self):
        try:
            super().handle_one_request()
        except (TimeoutError, ConnectionError):
            self.close_connection = True

    def do_POST(self):
        self._serve("POST")

    def do_PUT(self):
        self._serve("PUT")

    def do_GET(self):
        self._serve("GET")

    def do_HEAD(self):
        self._serve("GET", with_body=False)

    def _serve(self, method: str, with_body: bool = True):
        url = urlsplit(self.path)
        path = url.path
        self.query = {name: values[0] for name, values in parse_qs(url.query).items()}
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.hub.lock:
            self.hub.requests.append(Request(self.command, path, len(self.body)))
        fault = self.hub.take_fault(f"{self.command} {path}")
        if fault is not None and fault.before is not None:
            fault.before()
            fault = None
        if fault is not None and fault.status is None:
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        try:
            if fault is not None:
                raise _error(fault.status, fault.message)
            with self.hub.lock:
                self._route(method, path)
            raise _error(404, f"no such address: {path}")
        except _Answer as answer:
            self._send(answer, with_body)

    def _send(self, answer: _Answer, with_body: bool):
        body = answer.body
        status = answer.status
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if wanted and status == 200:
            body, status = body[int(wanted[1]) :], 206
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **answer.headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def _route(self, method: str, path: str):
        for expected, pattern, name in self.routes:
            match = re.fullmatch(pattern, path)
            if match and expected == method:
                groups = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                if "repo_id" in groups:
                    kind = groups.pop("kind", "models")
                    groups["repository"] = self._repository(TYPES[kind], groups.pop("repo_id"))
                getattr(self, name)(**groups)

    def _json(self) -> dict:
        return json.loads(self.body or b"{}")

    def _require_token(self):
        sent = self.headers.get("Authorization")
        if sent != f"Bearer {TOKEN}":
            raise _error(401, "Invalid username or password." if sent else "Unauthorized")

    def _repository(self, repo_type: str, repo_id: str) -> Repository:
        found = self.hub.repositories.get((repo_type, repo_id))
        if found is None or (found.private and self.headers.get("Authorization") != f"Bearer {TOKEN}"):
            raise _error(404, "Repository not found", "RepoNotFound")
        return found

    @staticmethod
    def _commit_at(repository: Repository, revision: str) -> Commit:
        commit = repository.at(revision)
        if commit is None:
            raise _error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def whoami(self):
        self._require_token()
        raise _Answer(200, {"name": USER, "type": "user", "auth": {"accessToken": {"role": "write"}}})

    def create_repository(self):
        self._require_token()
        wanted = self._json()
        repo_type = wanted.get("type") or "model"
        repo_id = f"{wanted.get('organization') or USER}/{wanted['name']}"
        if not repo_id.startswith(f"{USER}/"):
            raise _error(403, f"You don't have the rights to create a {repo_type} under this namespace")
        prefix = "" if repo_type == "model" else f"{repo_type}s/"
        answer = {"url": f"{self.hub.endpoint}/{prefix}{repo_id}", "name": repo_id}
        if (repo_type, repo_id) in self.hub.repositories:
            raise _Answer(409, {"error": "You already created this repo", **answer})
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        self.hub.repositories[repo_type, repo_id] = Repository(repo_type, repo_id, private)
        raise _Answer(200, answer)

    def validate_card(self):
        content = self._json()["content"]
        match = re.match(r"---\r?\n(.*?)\r?\n---(\r?\n|$)", content, flags=re.DOTALL)
        if match is None:
            raise _Answer(
                200, {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}
            )
        problems = _metadata_problems(match[1])
        raise _Answer(400 if problems else 200, {"errors": [{"message": text} for text in problems], "warnings": []})

    def preupload(self, repository: Repository, revision: str):
        self._require_token()
        present = self._commit_at(repository, revision).files
        answers = []
        for file in self._json()["files"]:
            path = file["path"]
            mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
            oid = present[path].oid if path in present else None
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        raise _Answer(200, {"files": answers})

    def lfs_batch(self, repository: Repository):
        self._require_token()
        answers = []
        for wanted in self._json()["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.blobs:
                answer["actions"] = {
                    "upload": {"href": f"{self.hub.endpoint}/lfs/{wanted['oid']}"},
                    "verify": {"href": f"{self.hub.endpoint}/lfs/verify"},
                }
            answers.append(answer)
        raise _Answer(200, {"transfer": "basic", "objects": answers})

    def lfs_upload(self, oid: str):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _error(400, "the content does not have this hash")
        self.hub.blobs[oid] = self.body
        raise _Answer(200)

    def lfs_verify(self):
        wanted = self._json()
        if len(self.hub.blobs.get(wanted["oid"], b"")) != wanted["size"]:
            raise _error(404, "object not uploaded")
        raise _Answer(200)

    def commit(self, repository: Repository, revision: str):
        self._require_token()
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = lines[0]["value"]
        parent = self._commit_at(repository, revision)
        if header.get("parentCommit") not in (None, parent.oid):
            raise _error(412, "A commit has happened since. Please refresh and try again.")
        files = dict(parent.files)
        for line in lines[1:]:
            self._apply(files, line["key"], line["value"])
        made = repository.commit(revision, header["summary"], files)
        url = f"{self.hub.endpoint}/{repository.repo_id}/commit/{made.oid}"
        raise _Answer(200, {"success": True, "commitOid": made.oid, "commitUrl": url, "hookOutput": ""})

    def _apply(self, files: dict[str, StoredFile], key: str, value: dict):
        path = value["path"]
        if path.startswith("/") or ".." in path.split("/"):
            raise _error(400, f"Invalid path: {path}")
        if key == "file":
            files[path] = StoredFile(base64.b64decode(value["content"]), is_lfs=False)
        elif key == "lfsFile":
            if value["oid"] not in self.hub.blobs:
                raise _error(400, f"Your push was rejected because the LFS pointer of {path} points to no file")
            files[path] = StoredFile(self.hub.blobs[value["oid"]], is_lfs=True)
        elif key == "deletedFile" and path in files:
            del files[path]
        else:
            raise _error(400, f"cannot {key} {path}")

    def create_branch(self, repository: Repository, branch: str):
        self._require_token()
        if branch in repository.refs:
            raise _error(409, "Reference already exists")
        repository.refs[branch] = self._commit_at(repository, self._json().get("startingPoint", "main")).oid
        raise _Answer(200)

    def create_tag(self, repository: Repository, revision: str):
        self._require_token()
        repository.refs[self._json()["tag"]] = self._commit_at(repository, revision).oid
        raise _Answer(200)

    def info(self, repository: Repository, revision: str = "main"):
        commit = self._commit_at(repository, revision)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        answer = {"_id": "0", "id": repository.repo_id, "sha": commit.oid, "private": repository.private}
        answer |= {"siblings": siblings, "tags": [], "lastModified": DATE, "gated": False, "disabled": False}
        raise _Answer(200, answer)

    def tree(self, repository: Repository, revision: str, folder: str = ""):
        files = self._commit_at(repository, revision).files
        is_recursive = self.query.get("recursive", "").lower() in ("1", "true")
        prefix = f"{folder.rstrip('/')}/" if folder else ""
        inside = {path: file for path, file in files.items() if path.startswith(prefix)}
        if folder and not inside:
            raise _error(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        folders = {prefix + path[len(prefix) :].split("/")[0] for path in inside if "/" in path[len(prefix) :]}
        entries = [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(folders)]
        entries += [
            _file_entry(path, file) for path, file in inside.items() if is_recursive or "/" not in path[len(prefix) :]
        ]
        raise _Answer(200, entries)

    def paths_info(self, repository: Repository, revision: str):
        files = self._commit_at(repository, revision).files
        wanted = (
            self._json().get("paths") if self.body.startswith(b"{") else parse_qs(self.body.decode()).get("paths", [])
        )
        raise _Answer(200, [_file_entry(path, files[path]) for path in wanted if path in files])

    def resolve(self, repository: Repository, revision: str, path: str):
        commit = self._commit_at(repository, revision)
        headers = {"X-Repo-Commit": commit.oid, "Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"}
        file = commit.files.get(path)
        if file is None:
            missing = _error(404, "Entry not found", "EntryNotFound")
            missing.headers |= {"X-Repo-Commit": commit.oid}
            raise missing
        headers["ETag"] = f'"{file.oid}"'
        if file.is_lfs:
            headers |= {"X-Linked-ETag": f'"{file.oid}"', "X-Linked-Size": str(len(file.data))}
        raise _Answer(200, file.data, headers)


def _file_entry(path: str, file: StoredFile) -> dict:
    entry = {"type": "file", "path": path, "oid": file.oid[:40], "size": len(file.data)}
    lfs = {"oid": file.oid, "size": len(file.data), "pointerSize": 134}
    return entry | ({"lfs": lfs} if file.is_lfs else {})


def _metadata_problems(block: str) -> list[str]:
    """What the Hub would refuse in the metadata of a card."""
    try:
        data = yaml.safe_load(block)
    except yaml.YAMLError:
        return ["the metadata is no YAML"]
    if not isinstance(data, dict):
        return ["the metadata must be a mapping"]
    problems = []
    for model in data.get("model-index") or []:
        if "name" not in model:
            problems.append('"model-index[0].name" is required')
        for result in model.get("results", []):
            if not {"type", "name"} <= set(result.get("dataset", {})):
                problems.append('"model-index[0].results[0].dataset" needs type and name')
            if any("value" not in metric for metric in result.get("metrics", [])):
                problems.append('"model-index[0].results[0].metrics[0].value" is required')
    return problems
