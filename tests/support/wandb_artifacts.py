"""The artifacts of the tests' W&B server: what clients create, and what tests put there.

``server.artifacts.named("NAME")`` has the versions of a collection, oldest first, with their
content; ``add`` makes a version without a client, and ``damage`` changes a stored file.
"""

# ruff: noqa: N802 (methods are named as W&B's operations)

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

_NO_TTL = -1
_TIME = "2026-01-01T00:00:00Z"


def md5(data: bytes) -> str:
    return base64.b64encode(hashlib.md5(data).digest()).decode()


@dataclass
class StoredArtifact:
    """One version of an artifact."""

    id: str
    entity: str
    project: str
    collection: str
    type: str
    index: int
    """The number in ``v0``, ``v1`` ..."""
    digest: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)
    description: str | None = None
    aliases: list[str] = field(default_factory=list)
    ttl: int = _NO_TTL
    """Seconds; negative without one."""
    state: str = "PENDING"
    run: str | None = None
    """The id of the run that has made it."""
    files: dict[str, bytes] = field(default_factory=dict)
    """The content by path in the artifact; without references."""
    manifest: dict[str, Any] = field(default_factory=lambda: {"contents": {}})
    client_id: str | None = None
    wanted: list[str] = field(default_factory=list)
    """The aliases that it gets with the commit."""

    @property
    def references(self) -> dict[str, str]:
        """The URLs by path in the artifact."""
        return {p: e["ref"] for p, e in self.manifest["contents"].items() if "ref" in e}

    @property
    def is_committed(self) -> bool:
        return self.state == "COMMITTED"

    @property
    def name(self) -> str:
        return f"{self.entity}/{self.project}/{self.collection}:v{self.index}"


class WandbArtifacts:
    """The store behind a server whose address is ``url``."""

    def __init__(self, url: str = "") -> None:
        self.url = url
        self.all: list[StoredArtifact] = []
        self.uses: list[tuple[str, StoredArtifact]] = []
        """Inputs of runs: the id of the run, and the artifact."""
        self.links: list[tuple[StoredArtifact, str, list[str]]] = []
        """Artifacts, the collections ENTITY/PROJECT/NAME that they are linked to, and aliases."""
        self.registries = {"wandb-registry-model"}
        """Registries that exist; a link to another one is refused."""
        self._manifest_bytes: dict[str, bytes] = {}

    # -- for tests ---------------------------------------------------------------------------

    def named(self, collection: str) -> list[StoredArtifact]:
        """The committed versions of a collection, oldest first."""
        return [a for a in self.all if a.collection == collection and a.is_committed]

    def aliased(self, collection: str, alias: str) -> StoredArtifact | None:
        """The version that has an alias; None without one."""
        found = [a for a in self.named(collection) if alias in (*a.aliases, f"v{a.index}")]
        return found[-1] if found else None

    def inputs(self, run: str) -> list[StoredArtifact]:
        """What a run has used."""
        return [artifact for user, artifact in self.uses if user == run]

    def add(
        self,
        collection: str,
        files: dict[str, bytes],
        *,
        type: str = "model",
        aliases: tuple[str, ...] = ("latest",),
        metadata: dict[str, Any] | None = None,
        references: dict[str, str] | None = None,
        entity: str = "me",
        project: str = "isorun",
    ) -> StoredArtifact:
        """Makes a committed version, as if a client had. ``references`` are URLs by path."""
        artifact = self._new(entity, project, collection, type)
        artifact.metadata, artifact.files = dict(metadata or {}), dict(files)
        contents: dict[str, Any] = {
            path: {"digest": md5(data), "size": len(data), "birthArtifactID": artifact.id}
            for path, data in files.items()
        }
        for path, url in (references or {}).items():
            contents[path] = {"digest": _reference_digest(url), "ref": url, "size": 0}
            if url.startswith("file://"):
                with open(url.removeprefix("file://"), "rb") as file:
                    data = file.read()
                contents[path] |= {"digest": md5(data), "size": len(data)}
        artifact.manifest = {
            "version": 1, "storagePolicy": "wandb-storage-policy-v1",
            "storagePolicyConfig": {"storageLayout": "V2"}, "contents": contents,
        }  # fmt: skip
        artifact.digest = hashlib.md5(json.dumps(contents, sort_keys=True).encode()).hexdigest()
        artifact.state = "COMMITTED"
        self._alias(artifact, aliases)
        return artifact

    def damage(self, artifact: StoredArtifact, path: str, data: bytes | None = None) -> None:
        """Changes a stored file, to ``data`` or in one byte. W&B's own manifest then names another
        digest, unless ``rehash`` is called."""
        before = artifact.files[path]
        artifact.files[path] = bytes([before[0] ^ 1]) + before[1:] if data is None else data

    def rehash(self, artifact: StoredArtifact) -> None:
        """Makes W&B's own manifest fit the files again, as if they were logged so."""
        contents = artifact.manifest["contents"]
        references = {path: entry for path, entry in contents.items() if "ref" in entry}
        artifact.manifest["contents"] = references | {
            path: {"digest": md5(data), "size": len(data), "birthArtifactID": artifact.id}
            for path, data in artifact.files.items()
        }

    # -- what clients send ---------------------------------------------------------------------

    def answer(self, operation: str, query: str, variables: dict[str, Any]) -> dict | None:
        """The data of a GraphQL operation; None if it does not concern artifacts. Raises
        ValueError for what W&B refuses."""
        method = getattr(self, f"_{operation}", None)
        if method is None:
            return None
        values = variables.get("input") or variables
        found = method(values)
        # Python's client names the result of most mutations "result".
        if "result:" in query and len(found) == 1:
            found = {**found, "result": next(iter(found.values()))}
        return found

    def put(self, path: str, data: bytes) -> None:
        """Takes the upload of a file, or of an artifact's manifest."""
        kind, artifact_id, name = path.split("/", 2)
        artifact = self._by_id(artifact_id)
        if kind == "manifest":
            self._manifest_bytes[artifact_id] = data
        else:
            artifact.files[name] = data

    def get(self, path: str) -> bytes | None:
        """A file for a download; None if there is none."""
        kind, artifact_id, name = path.split("/", 2)
        artifact = self._by_id(artifact_id)
        if kind == "manifest":
            return json.dumps(artifact.manifest).encode()
        return artifact.files.get(name)

    def _new(self, entity, project, collection, type) -> StoredArtifact:
        same = [
            a
            for a in self.all
            if (a.entity, a.project, a.collection) == (entity, project, collection)
        ]
        if same and same[0].type != type:
            raise ValueError(f"artifact collection {collection} has another type")
        artifact = StoredArtifact(_id(len(self.all)), entity, project, collection, type, len(same))
        self.all.append(artifact)
        return artifact

    def _by_id(self, artifact_id: str) -> StoredArtifact:
        for artifact in self.all:
            if artifact.id == artifact_id:
                return artifact
        raise ValueError(f"artifact {artifact_id} not found")

    def _alias(self, artifact: StoredArtifact, aliases) -> None:
        """Gives aliases to a version; others of the collection lose them."""
        for alias in aliases:
            for other in self.all:
                if other.collection == artifact.collection and alias in other.aliases:
                    other.aliases.remove(alias)
            artifact.aliases.append(alias)

    # -- GraphQL: creation -----------------------------------------------------------------------

    def _ServerFeaturesQuery(self, values):
        return {"serverInfo": {"features": []}}

    def _CreateArtifact(self, values):
        entity, project = values["entityName"], values["projectName"]
        collection = (
            values.get("artifactCollectionNames") or [values.get("artifactCollectionName")]
        )[0]
        same = [
            a
            for a in self.all
            if (a.entity, a.project, a.collection) == (entity, project, collection)
        ]
        aliases = [a["alias"] for a in values.get("aliases") or []]
        for other in same:
            if other.is_committed and other.digest == values["digest"]:
                self._alias(other, aliases)
                return {"createArtifact": {"artifact": self._created(other)}}
        artifact = self._new(entity, project, collection, values["artifactTypeName"])
        artifact.digest, artifact.run = values["digest"], values.get("runName")
        artifact.metadata = json.loads(values.get("metadata") or "{}")
        artifact.description = values.get("description")
        artifact.ttl = values.get("ttlDurationSeconds") or _NO_TTL
        artifact.client_id = values.get("clientID")
        artifact.wanted = aliases
        return {"createArtifact": {"artifact": self._created(artifact)}}

    def _created(self, artifact):
        before = [a for a in self.named(artifact.collection) if a is not artifact]
        latest = {"id": before[-1].id, "versionIndex": before[-1].index} if before else None
        sequence = {"id": f"seq-{artifact.collection}", "latestArtifact": latest}
        return {"id": artifact.id, "state": artifact.state, "artifactSequence": sequence}

    def _CreateArtifactManifest(self, values):
        return {"createArtifactManifest": self._manifest_upload(values["artifactID"])}

    def _UpdateArtifactManifest(self, values):
        artifact_id = values["artifactManifestID"].removeprefix("manifest-")
        return {"updateArtifactManifest": self._manifest_upload(artifact_id)}

    def _manifest_upload(self, artifact_id):
        file = {
            "id": f"file-{artifact_id}", "uploadHeaders": [],
            "uploadUrl": f"{self.url}/artifact-storage/manifest/{artifact_id}/manifest.json",
        }  # fmt: skip
        return {"artifactManifest": {"id": f"manifest-{artifact_id}", "file": file}}

    def _CreateArtifactFiles(self, values):
        edges = []
        for file in values["artifactFiles"]:
            artifact_id, name = file["artifactID"], file["name"]
            node = {
                "storagePath": f"wandb_artifacts/{artifact_id}/{name}", "uploadHeaders": [],
                "uploadUrl": f"{self.url}/artifact-storage/file/{artifact_id}/{name}",
                "uploadMultipartUrls": None, "artifact": {"id": artifact_id},
            }  # fmt: skip
            edges.append({"node": node})
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def _CommitArtifact(self, values):
        artifact = self._by_id(values["artifactID"])
        artifact.manifest = json.loads(self._manifest_bytes.pop(artifact.id))
        for path, entry in artifact.manifest["contents"].items():
            if "ref" not in entry and md5(artifact.files.get(path, b"")) != entry["digest"]:
                raise ValueError(f"artifact {artifact.name} lacks {path}")
        artifact.state = "COMMITTED"
        self._alias(artifact, artifact.wanted)
        return {"commitArtifact": {"artifact": {"id": artifact.id, "digest": artifact.digest}}}

    def _ClientIDMapping(self, values):
        found = [a for a in self.all if a.client_id == values["clientID"] and a.is_committed]
        return {"clientIDMapping": {"serverID": found[0].id} if found else None}

    # -- GraphQL: later changes ------------------------------------------------------------------

    def _UseArtifact(self, values):
        artifact = self._by_id(values["artifactID"])
        self.uses.append((values["runName"], artifact))
        node = {"id": artifact.id, "digest": artifact.digest, "description": None,
                "state": artifact.state, "createdAt": _TIME, "metadata": None}  # fmt: skip
        return {"useArtifact": {"artifact": node}}

    def _AddAliases(self, values):
        self._alias(self._by_id(values["artifactID"]), [a["alias"] for a in values["aliases"]])
        return {"addAliases": {"success": True}}

    def _DeleteAliases(self, values):
        artifact = self._by_id(values["artifactID"])
        gone = {a["alias"] for a in values["aliases"]}
        artifact.aliases = [alias for alias in artifact.aliases if alias not in gone]
        return {"deleteAliases": {"success": True}}

    def _UpdateArtifact(self, values):
        artifact = self._by_id(values["artifactID"])
        if values.get("metadata") is not None:
            artifact.metadata = json.loads(values["metadata"])
        if values.get("ttlDurationSeconds"):
            artifact.ttl = values["ttlDurationSeconds"]
        return {"updateArtifact": {"artifact": self._fragment(artifact)}}

    def _DeleteArtifact(self, values):
        artifact = self._by_id(values["artifactID"])
        artifact.state, artifact.files = "DELETED", {}
        return {"deleteArtifact": {"artifact": {"id": artifact.id}}}

    def _LinkArtifact(self, values):
        ids = {"id": values.get("artifactID") or values.get("artifactId")}
        client = values.get("clientID") or values.get("clientId")
        found = [a for a in self.all if a.id == ids["id"] or (client and a.client_id == client)]
        if not found:
            raise ValueError("artifact not found")
        project = values["projectName"]
        if project.startswith("wandb-registry-") and project not in self.registries:
            raise ValueError(f"registry {project} not found")
        target = f"{values['entityName']}/{project}/{values['artifactPortfolioName']}"
        aliases = [a["alias"] for a in values.get("aliases") or []]
        self.links.append((found[0], target, aliases))
        index = sum(place == target for _, place, _ in self.links) - 1
        return {"linkArtifact": {"versionIndex": index, "artifactMembership": None}}

    # -- GraphQL: queries ------------------------------------------------------------------------

    def _ArtifactType(self, values):
        found = self._find(
            values["entity"], values["project"], values["name"].split(":")[0] + ":v0"
        )
        artifact = {"artifactType": {"name": found.type}} if found else None
        return {"project": {"artifact": artifact}}

    def _ArtifactByID(self, values):
        return {"artifact": self._fragment(self._by_id(values["id"]))}

    def _ArtifactMembershipByName(self, values):
        found = self._find(values["entity"], values["project"], values["name"])
        if found is None:
            return {"project": {"artifactCollectionMembership": None}}
        collection = values["name"].split(":")[0]
        owner = _project(values["entity"], values["project"])
        membership = {
            "__typename": "ArtifactCollectionMembership", "id": f"membership-{found.id}",
            "versionIndex": found.index, "createdAt": _TIME,
            "aliases": [_alias(alias) for alias in [*found.aliases, f"v{found.index}"]],
            "artifactCollection": {"__typename": "ArtifactSequence", "name": collection, "project": owner},
            "artifact": self._fragment(found),
        }  # fmt: skip
        return {"project": {"artifactCollectionMembership": membership}}

    def _FetchArtifactManifest(self, values):
        return self._ArtifactManifest({"artifact_id": values["id"]})

    def _ArtifactManifest(self, values):
        url = f"{self.url}/artifact-storage/manifest/{values['artifact_id']}/manifest.json"
        return {"artifact": {"currentManifest": {"file": {"directUrl": url}}}}

    def _GetArtifactMembershipFileUrls(self, values):
        return self._ArtifactMembershipFiles(values)

    def _ArtifactMembershipFiles(self, values):
        artifact = self._find(
            values["entity"], values["project"], f"{values['collection']}:{values['alias']}"
        )
        edges = [
            {"node": self._file(artifact, path, entry)}
            for path, entry in artifact.manifest["contents"].items()
            if not values.get("fileNames") or path in values["fileNames"]
        ]
        files = {
            "totalCount": len(edges), "edges": edges,
            "pageInfo": {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False},
        }  # fmt: skip
        collection = {"__typename": "ArtifactSequence", "artifactMembership": {"files": files}}
        return {"project": {"artifactCollection": collection}}

    def _file(self, artifact, path, entry):
        url = entry.get("ref") or f"{self.url}/artifact-storage/file/{artifact.id}/{path}"
        return {
            "__typename": "File", "id": f"{artifact.id}-{path}", "name": path, "displayName": path,
            "url": url, "directUrl": url, "sizeBytes": entry.get("size", 0), "storagePath": None,
            "mimetype": None, "updatedAt": None, "digest": entry["digest"], "md5": entry["digest"],
        }  # fmt: skip

    def _IsProjectReadOnly(self, values):
        return {"project": {"readOnly": False}}

    def _XXHashDigestsEnabled(self, values):
        return {"entity": {"xxhashDigestsEnabled": False}}

    def _FetchArtifactDigestAlgorithm(self, values):
        return {"project": None}

    def _FetchOrgInfoFromEntity(self, values):
        organization = {"name": "org", "orgEntity": {"name": "org-entity"}}
        return {"entity": {"organization": organization, "user": None}}

    def _GetDefaultEntity(self, values):
        return {"viewer": {"id": "V", "entity": "me"}}

    def _FetchOrgEntityFromEntity(self, values):
        return self._FetchOrgInfoFromEntity(values)

    def _find(self, entity, project, name) -> StoredArtifact | None:
        """The version of ``NAME:ALIAS``, in its own project or in one that it is linked to."""
        collection, _, alias = name.partition(":")
        alias = alias or "latest"
        place = f"{entity}/{project}/{collection}"
        linked = [(a, aliases) for a, target, aliases in self.links if target == place]
        for index, (artifact, aliases) in reversed(list(enumerate(linked))):
            if alias in ("latest", f"v{index}", *aliases):
                return artifact
        found = [
            a
            for a in self.named(collection)
            if (a.entity, a.project) == (entity, project) and alias in (*a.aliases, f"v{a.index}")
        ]
        return found[-1] if found else None

    def _fragment(self, artifact):
        owner = _project(artifact.entity, artifact.project)
        contents = artifact.manifest["contents"]
        collection = {
            "__typename": "ArtifactSequence",
            "name": artifact.collection,
            "project": owner,
        }
        return {
            "__typename": "Artifact", "id": artifact.id, "artifactSequence": collection,
            "versionIndex": artifact.index, "artifactType": {"name": artifact.type},
            "description": artifact.description, "metadata": json.dumps(artifact.metadata),
            "ttlDurationSeconds": artifact.ttl, "ttlIsInherited": artifact.ttl == _NO_TTL, "tags": [],
            "historyStep": None, "state": artifact.state,
            "size": sum(entry.get("size", 0) for entry in contents.values()),
            "digest": artifact.digest, "commitHash": "", "fileCount": len(contents),
            "createdAt": _TIME, "updatedAt": None,
            "aliases": [
                {**_alias(alias), "artifactCollection": collection}
                for alias in [*artifact.aliases, f"v{artifact.index}"]
            ],
        }  # fmt: skip


def _id(number: int) -> str:
    """An id as W&B makes them: base64 without "=", since clients convert it to hex."""
    return base64.b64encode(f"Artifact:{number:06d}".encode()).decode()


def _alias(alias: str) -> dict[str, str]:
    return {"__typename": "ArtifactAlias", "id": f"alias-{alias}", "alias": alias}


def _project(entity: str, project: str) -> dict[str, Any]:
    return {"__typename": "Project", "id": "P", "internalId": "1", "name": project,
            "entity": {"name": entity}}  # fmt: skip


def _reference_digest(url: str) -> str:
    return md5(url.encode())
