"""Writes an OCI image layout as a tar: oci.py OUT.tar NAME LAYER..., a layer being a folder or a tar. `docker load` takes it too.

The variable COMMAND is what a container runs by default (words by spaces), or it is a shell.

Follows the OCI image-spec 1.1 (image-layout.md, manifest.md, config.md, layer.md). Layers are not compressed:
the images are read once, from a local disk.
"""

import hashlib
import io
import json
import os
import sys
import tarfile


def folder_as_tar(folder: str, path: str) -> None:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name in sorted(os.listdir(folder)):
            tar.add(os.path.join(folder, name), arcname=name)


def sha256(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def main() -> None:
    out, name, *layers = sys.argv[1:]
    with tarfile.open(out, "w") as tar:

        def blob(data: bytes, media_type: str) -> dict:
            digest = hashlib.sha256(data).hexdigest()
            info = tarfile.TarInfo(f"blobs/sha256/{digest}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
            return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}

        descriptors = []
        for number, layer in enumerate(layers):
            path = layer
            if os.path.isdir(layer):
                path = f"{out}.layer{number}"
                folder_as_tar(layer, path)
            digest = sha256(path)
            tar.add(path, arcname=f"blobs/sha256/{digest}")
            descriptors.append({
                "mediaType": "application/vnd.oci.image.layer.v1.tar",
                "digest": f"sha256:{digest}",
                "size": os.path.getsize(path),
            })
            if path != layer:
                os.unlink(path)

        config = blob(json.dumps({
            "architecture": "amd64",
            "os": "linux",
            "config": {
                "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
                "Cmd": os.environ.get("COMMAND", "/bin/sh").split(),
                "WorkingDir": "/",
            },
            "rootfs": {"type": "layers", "diff_ids": [layer["digest"] for layer in descriptors]},
        }).encode(), "application/vnd.oci.image.config.v1+json")
        manifest = blob(json.dumps({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": config,
            "layers": descriptors,
        }).encode(), "application/vnd.oci.image.manifest.v1+json")
        manifest["annotations"] = {
            "io.containerd.image.name": name,
            "org.opencontainers.image.ref.name": name.rsplit(":", 1)[1],
        }
        for path, content in (
            ("oci-layout", {"imageLayoutVersion": "1.0.0"}),
            ("index.json", {"schemaVersion": 2, "manifests": [manifest]}),
            # What Docker reads instead of the two.
            ("manifest.json", [{
                "Config": f"blobs/sha256/{config['digest'].removeprefix('sha256:')}",
                "RepoTags": [name],
                "Layers": [f"blobs/sha256/{layer['digest'].removeprefix('sha256:')}" for layer in descriptors],
            }]),
        ):
            data = json.dumps(content).encode()
            info = tarfile.TarInfo(path)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


if __name__ == "__main__":
    main()
