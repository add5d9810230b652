"""A small Hub on 127.0.0.1, for the real `huggingface_hub` client: what it commits is atomic, as on the Hub.

Repositories lie in memory. Tests give out tokens (`add_user`), look at what there is (`repos`, `requests`), and say what goes
wrong: routes that fail (`fail`), that stop answering (`stall`), whose reply is lost or another after they did their work
(`lose_reply`, `forge_reply`), or that do something else before it (`before`); uploads that are cut or held (`cut_upload`,
`hold_upload`). Clients need `HF_ENDPOINT` set to the server's `url`, and `HF_HUB_DISABLE_XET=1`.
"""

import base64
import hashlib
import json
import re
import secrets
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


LFS_SUFFIXES = (".safetensors", ".png", ".bin", ".pt", ".pth")
LFS_SIZE = 10 * 2**20
CHUNK = 2**16
COMMON = {
    "route",
    "times",
    "skip",
}  # of a fault: which requests it is for, how many of them, and after how many others


@dataclass
class File:
    """A file of a commit."""

    content: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def git_oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_oid


@dataclass
class Repo:
    """A repository: what `files` it has at every commit, and where branches and tags point to."""

    id: str
    type: str
    private: bool
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    parents: dict[str, str | None] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def head(self) -> str:
        return self.branches["main"]

    def commit(self, branch: str, files: dict[str, File]) -> str:
        """Everything or nothing: one assignment moves the branch."""
        oid = secrets.token_hex(20)
        self.parents[oid] = self.branches.get(branch)
        self.commits[oid] = files
        self.branches[branch] = oid
        return oid

    def find(self, revision: str) -> str | None:
        revision = revision.removeprefix("refs/heads/")
        found = self.branches.get(revision) or self.tags.get(revision) or revision
        return found if found in self.commits else None

    def history(self, branch: str = "main") -> list[str]:
        oids = [self.branches[branch]]
        while (parent := self.parents[oids[-1]]) is not None:
            oids.append(parent)
        return oids


class Refusal(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.code = status, code


class HubServer(ThreadingHTTPServer):
    """The Hub; a context manager that serves while it is open."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.lock = threading.RLock()
        self.reset()

    def reset(self):
        """Forgets all repositories, users, faults and requests."""
        self.repos: dict[tuple[str, str], Repo] = {}
        self.users: dict[str, dict] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.faults: list[dict] = []
        self.stalled = threading.Event()

    def calm(self):
        """Nothing goes wrong any more; stalled requests end."""
        self.faults.clear()
        self.stalled.set()
        self.stalled = threading.Event()

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.shutdown()
        self.server_close()

    def add_user(self, name: str, orgs: tuple[str, ...] = ()) -> str:
        """A user, who may write to their own and their organisations' namespaces; returns their token."""
        token = "hf_" + "".join(secrets.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(34))
        self.users[token] = {"name": name, "orgs": orgs}
        return token

    def add_repo(self, id: str, repo_type: str = "model", private: bool = False) -> Repo:
        """A repository as the Hub creates it, with one commit."""
        repo = self.repos[repo_type, id] = Repo(id, repo_type, private)
        repo.commit("main", {".gitattributes": File(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n", False)})
        return repo

    def fail(self, route: str, status: int = 500, times: int = 1, page: bytes | None = None, skip: int = 0):
        """The next requests whose "METHOD /path" matches the pattern fail, as the Hub does or with a page of a proxy."""
        self.faults.append({"route": re.compile(route), "times": times, "status": status, "page": page, "skip": skip})

    def stall(self, route: str, after: int = 0, times: int = 1):
        """The next replies of a route stop after some bytes of their content, or before their headers."""
        self.faults.append({"route": re.compile(route), "times": times, "stall": after})

    def stall_upload(self, times: int = 1):
        """The next uploads of large files are not read to their end."""
        self.faults.append({"route": re.compile("^PUT /lfs/"), "times": times, "stall_body": True})

    def lose_reply(self, route: str, times: int = 1):
        """The next requests of a route do what they should, and their connections end without a reply."""
        self.faults.append({"route": re.compile(route), "times": times, "lost": True})

    def forge_reply(self, route: str, content, status: int = 200, times: int = 1):
        """The next requests of a route do what they should, and get another reply."""
        self.faults.append({"route": re.compile(route), "times": times, "forged": (content, status)})

    def before(self, route: str, action, times: int = 1):
        """Calls a function when the next requests of a route have arrived; `False` lets them do nothing, and reply `{}`."""
        self.faults.append({"route": re.compile(route), "times": times, "action": action})

    def after(self, route: str, action):
        """Calls a function when the next request of a route has done its work, before the reply."""
        self.faults.append({"route": re.compile(route), "times": 1, "after": action})

    def during_upload(self, action):
        """Calls a function when the first bytes of the next large file have arrived."""
        self.faults.append({"route": re.compile("^PUT /lfs/"), "times": 1, "during": action})

    def cut_upload(self, after: int, times: int = 1):
        """The next uploads of large files lose their connection after some bytes."""
        self.faults.append({"route": re.compile("^PUT /lfs/"), "times": times, "cut": after})

    def hold_upload(self) -> tuple[threading.Event, threading.Event]:
        """The next upload of a large file hangs in its middle: an event says when, and another lets it go on."""
        reached, go_on = threading.Event(), threading.Event()
        self.faults.append({"route": re.compile("^PUT /lfs/"), "times": 1, "hold": (reached, go_on)})
        return reached, go_on

    def take_fault(self, request: str) -> dict:
        """What goes wrong with a request; several faults may, but one of a kind at a time."""
        taken = {}
        with self.lock:
            for fault in self.faults:
                if not fault["route"].search(request) or set(fault) & set(taken) - COMMON:
                    continue
                if fault.get("skip"):
                    fault["skip"] -= 1
                elif fault["times"]:
                    fault["times"] -= 1
                    taken |= fault
        return taken

    def handle_error(self, request, client_address):
        pass  # a client that was killed hangs up


class Handler(BaseHTTPRequestHandler):
    """One request: `ROUTES` names the method that answers it."""

    protocol_version = "HTTP/1.1"
    server: HubServer

    def answer(self):
        url = urlsplit(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        request = f"{self.command} {url.path}"
        self.server.requests.append((self.command, url.path))
        self.fault = self.server.take_fault(request)
        try:
            self.body = self.read_body()
            if "action" in self.fault and self.fault["action"]() is False:
                return self.send({})
            if self.fault.get("page"):
                return self.send(self.fault["page"], self.fault["status"], {"Content-Type": "text/html"})
            if "status" in self.fault:
                raise Refusal(self.fault["status"], "This route was told to fail")
            self.user = self.authenticate()
            method = "GET" if self.command == "HEAD" else self.command
            for pattern, route in ROUTES:
                if match := re.fullmatch(pattern, f"{method} {url.path}"):
                    with self.server.lock:
                        route(self, **{key: unquote(value) for key, value in match.groupdict("").items()})
                        self.fault.get("after", bool)()
                    return self.send(*self.replied)
            raise Refusal(404, f"No route for {request}")
        except Refusal as refusal:
            headers = {"X-Error-Message": str(refusal)} | ({"X-Error-Code": refusal.code} if refusal.code else {})
            self.send({"error": str(refusal)}, refusal.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def read_body(self) -> bytes:
        body = bytearray()
        for part in self.body_parts():
            body += part
            self.fault.pop("during", bool)()
            if self.fault.get("stall_body"):
                self.server.stalled.wait()
                raise ConnectionAbortedError
            if len(body) >= self.fault.get("cut", float("inf")):
                self.connection.shutdown(socket.SHUT_RDWR)
                raise ConnectionAbortedError
            if "hold" in self.fault:
                reached, go_on = self.fault.pop("hold")
                reached.set()
                go_on.wait()
        return bytes(body)

    def body_parts(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        left = int(self.headers.get("Content-Length", 0))
        while left:
            part = self.rfile.read(min(left, CHUNK))
            if not part:
                raise ConnectionAbortedError
            left -= len(part)
            yield part

    def authenticate(self) -> dict | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if not token:
            return None
        if token not in self.server.users:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.server.users[token]

    def reply(self, content, status: int = 200, headers: dict | None = None):
        """What a route answers; it is sent when the lock is free again."""
        self.replied = content, status, headers

    def send(self, content, status: int = 200, headers: dict | None = None):
        if self.fault.get("lost"):
            self.connection.shutdown(socket.SHUT_RDWR)
            raise ConnectionAbortedError
        content, status = self.fault.get("forged", (content, status))
        stall = self.fault.get("stall")
        if stall == 0:
            self.server.stalled.wait()
            raise ConnectionAbortedError
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(content))} | (headers or {})
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:stall])
            if stall is not None:
                self.wfile.flush()
                self.server.stalled.wait()
                raise ConnectionAbortedError

    def log_message(self, *args):
        pass

    def json(self) -> dict:
        return json.loads(self.body or b"{}")

    # Who may do what.

    def may_write(self, namespace: str) -> bool:
        return self.user is not None and namespace in (self.user["name"], *self.user["orgs"])

    def readable(self, id: str, types: str = "models") -> Repo:
        repo = self.server.repos.get((types.removesuffix("s"), id))
        if repo is None or (repo.private and not self.may_write(id.split("/")[0])):
            raise Refusal(401 if self.user is None else 404, "Repository not found", "RepoNotFound")
        return repo

    def writable(self, id: str, types: str = "models") -> Repo:
        repo = self.readable(id, types)
        if not self.may_write(id.split("/")[0]):
            raise Refusal(403 if self.user else 401, "You don't have the rights to write to this repository")
        return repo

    def revision(self, repo: Repo, revision: str) -> str:
        oid = repo.find(revision or "main")
        if oid is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid

    # Routes.

    def whoami(self):
        if self.user is None:
            raise Refusal(401, "Invalid username or password.")
        orgs = [{"type": "org", "name": name} for name in self.user["orgs"]]
        self.reply({"type": "user", "name": self.user["name"], "orgs": orgs, "auth": {"type": "access_token"}})

    def validate_yaml(self):
        found = re.match(r"---\n(.*?)\n---", self.json()["content"], re.DOTALL)
        try:
            wrong = not isinstance(yaml.safe_load(found[1]) if found else {}, dict)
        except yaml.YAMLError:
            wrong = True
        self.reply({"errors": [{"message": "not YAML"}] if wrong else [], "warnings": []}, 400 if wrong else 200)

    def create(self):
        asked = self.json()
        if self.user is None:
            raise Refusal(401, "Invalid username or password.")
        namespace, repo_type = asked.get("organization") or self.user["name"], asked.get("type") or "model"
        if not self.may_write(namespace):
            raise Refusal(403, f'You don\'t have the rights to create a {repo_type} under the namespace "{namespace}"')
        id = f"{namespace}/{asked['name']}"
        prefix = "" if repo_type == "model" else f"{repo_type}s/"
        url = {"url": f"{self.server.url}/{prefix}{id}", "name": id}
        if (repo_type, id) in self.server.repos:
            return self.reply(url | {"error": f"You already created this {repo_type} repo"}, 409)
        private = asked.get("private", asked.get("visibility") == "private")
        self.server.add_repo(id, repo_type, bool(private))
        self.reply(url)

    def info(self, types, id, revision):
        repo = self.readable(id, types)
        oid = self.revision(repo, revision)
        siblings = [{"rfilename": path} for path in sorted(repo.commits[oid])]
        about = {"_id": "0", "id": id, "modelId": id, "sha": oid, "private": repo.private, "gated": False}
        if "README.md" in repo.commits[oid]:
            about["cardData"] = yaml.safe_load(repo.commits[oid]["README.md"].content.decode().split("---\n")[1])
        self.reply(about | {"tags": [], "downloads": 0, "likes": 0, "siblings": siblings})

    def preupload(self, types, id, revision):
        repo = self.writable(id, types)
        old = repo.commits[self.revision(repo, revision)]
        answers = []
        for asked in self.json()["files"]:
            path = asked["path"]
            lfs = path.endswith(LFS_SUFFIXES) or asked["size"] > LFS_SIZE
            answer = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            answers.append(answer | ({"oid": old[path].etag} if path in old else {}))
        self.reply({"files": answers})

    def lfs_batch(self, id, types):
        self.writable(id, types or "models")
        objects = []
        for asked in self.json()["objects"]:
            actions = {
                "upload": {"href": f"{self.server.url}/lfs/{asked['oid']}"},
                "verify": {"href": f"{self.server.url}/lfs/verify"},
            }
            objects.append(asked | ({} if asked["oid"] in self.server.blobs else {"actions": actions}))
        self.reply({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "The content is not what its name says")
        self.server.blobs[oid] = self.body
        self.reply(b"")

    def lfs_verify(self):
        asked = self.json()
        if len(self.server.blobs.get(asked["oid"], b"")) != asked["size"]:
            raise Refusal(404, "The file is not there")
        self.reply({})

    def commit(self, types, id, revision):
        repo = self.writable(id, types)
        if revision not in repo.branches:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        lines = [json.loads(line) for line in self.body.splitlines()]
        head = repo.branches[revision]
        if lines[0]["value"].get("parentCommit", head) != head:
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repo.commits[head])
        for line in lines[1:]:
            path = line["value"]["path"]
            if line["key"] == "file":
                files[path] = File(base64.b64decode(line["value"]["content"]), lfs=False)
            elif line["key"] == "lfsFile":
                oid = line["value"]["oid"]
                if oid not in self.server.blobs:
                    raise Refusal(400, f"{path} was never uploaded")
                files[path] = File(self.server.blobs[oid], lfs=True)
            elif line["key"] == "deletedFile":
                if files.pop(path, None) is None:
                    raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
            elif line["key"] == "deletedFolder":
                files = {name: file for name, file in files.items() if not name.startswith(path.rstrip("/") + "/")}
            else:
                raise Refusal(400, f"Unknown operation {line['key']}")
        oid = repo.commit(revision, files)
        url = f"{self.server.url}/{id}/commit/{oid}"
        self.reply({"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    def tree(self, types, id, revision, folder):
        repo = self.readable(id, types)
        files = repo.commits[self.revision(repo, revision)]
        folder = folder and folder + "/"
        recursive = self.query.get("recursive", "").lower() == "true"
        entries = {}
        for path, file in sorted(files.items()):
            inner = path.removeprefix(folder)
            if not path.startswith(folder):
                continue
            parts = inner.split("/")
            for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
                parent = folder + "/".join(parts[:depth])
                entries[parent] = {"type": "directory", "path": parent, "oid": "0" * 40, "size": 0}
            if recursive or len(parts) == 1:
                entries[path] = entry(path, file)
        if folder and not entries:
            raise Refusal(404, f"{folder} does not exist", "EntryNotFound")
        self.reply(list(entries.values()))

    def paths_info(self, types, id, revision):
        repo = self.readable(id, types)
        files = repo.commits[self.revision(repo, revision)]
        asked = self.json().get("paths") if self.body[:1] == b"{" else parse_qs(self.body.decode()).get("paths", [])
        self.reply([entry(path, files[path]) for path in asked if path in files])

    def refs(self, types, id):
        repo = self.readable(id, types)
        kinds = {"branches": ("heads", repo.branches), "tags": ("tags", repo.tags)}
        found = {
            kind: [{"name": n, "ref": f"refs/{ref}/{n}", "targetCommit": oid} for n, oid in names.items()]
            for kind, (ref, names) in kinds.items()
        }
        self.reply(found | {"converts": [], "pullRequests": []})

    def add_tag(self, types, id, revision):
        repo = self.writable(id, types)
        if (tag := self.json()["tag"]) in repo.tags:
            raise Refusal(409, f"Tag reference exists already: {tag}")
        repo.tags[tag] = self.revision(repo, revision)
        self.reply({})

    def add_branch(self, types, id, branch):
        repo = self.writable(id, types)
        if branch in repo.branches:
            raise Refusal(409, "Reference already exists")
        repo.branches[branch] = self.revision(repo, self.json().get("startingPoint") or "main")
        self.reply({})

    def resolve(self, types, id, revision, path):
        repo = self.readable(id, types or "models")
        oid = self.revision(repo, revision)
        file = repo.commits[oid].get(path)
        headers = {"X-Repo-Commit": oid}
        if file is None:
            headers |= {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return self.reply({"error": "Entry not found"}, 404, headers)
        headers |= {"ETag": f'"{file.etag}"', "Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"}
        if file.lfs:
            headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.content))}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            part = file.content[int(wanted[1]) : int(wanted[2]) + 1 if wanted[2] else None]
            span = f"bytes {wanted[1]}-{int(wanted[1]) + len(part) - 1}/{len(file.content)}"
            return self.reply(part, 206, headers | {"Content-Range": span})
        self.reply(file.content, 200, headers)


def entry(path: str, file: File) -> dict:
    """A file in a tree's listing."""
    about = {"type": "file", "path": path, "oid": file.git_oid, "size": len(file.content)}
    if file.lfs:
        about["lfs"] = {"oid": file.sha256, "size": len(file.content), "pointerSize": 134}
    return about


API = r"/api/(?P<types>models|datasets|spaces)/(?P<id>[\w.-]+/[\w.-]+)"
FILES = r"/(?:(?P<types>datasets|spaces)/)?(?P<id>[\w.-]+/[\w.-]+)"
ROUTES = [
    (r"GET /api/whoami-v2", Handler.whoami),
    (r"POST /api/validate-yaml", Handler.validate_yaml),
    (r"POST /api/repos/create", Handler.create),
    (rf"GET {API}(?:/revision/(?P<revision>[^/]+))?", Handler.info),
    (rf"POST {API}/preupload/(?P<revision>[^/]+)", Handler.preupload),
    (rf"POST {API}/commit/(?P<revision>[^/]+)", Handler.commit),
    (rf"GET {API}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", Handler.tree),
    (rf"POST {API}/paths-info/(?P<revision>[^/]+)", Handler.paths_info),
    (rf"GET {API}/refs", Handler.refs),
    (rf"POST {API}/tag/(?P<revision>[^/]+)", Handler.add_tag),
    (rf"POST {API}/branch/(?P<branch>[^/]+)", Handler.add_branch),
    (rf"POST {FILES}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    (r"PUT /lfs/(?P<oid>[0-9a-f]{64})", Handler.lfs_put),
    (r"POST /lfs/verify", Handler.lfs_verify),
    (rf"GET {FILES}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
]
