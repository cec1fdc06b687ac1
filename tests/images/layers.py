"""Writes 19 layer tars into a folder: each adds, replaces or removes what an earlier one made (image-spec, layer.md)."""

import io
import os
import sys
import tarfile

ODD_NAMES = ["with space", "new\nline", "-dash", "ünïcode", "quote'\"", "back\\slash", "x" * 200, "...", "*"]


class Layer:
    def __init__(self, path: str):
        self.tar = tarfile.open(path, "w", format=tarfile.PAX_FORMAT)

    def add(self, name: str, kind: bytes = tarfile.REGTYPE, data: bytes = b"", mode: int = 0o644, **fields) -> None:
        info = tarfile.TarInfo(name)
        info.type, info.mode, info.size, info.mtime = kind, mode, len(data), 1_700_000_000
        for field, value in fields.items():
            setattr(info, field, value)
        self.tar.addfile(info, io.BytesIO(data))

    def folder(self, name: str, mode: int = 0o755) -> None:
        self.add(name, tarfile.DIRTYPE, mode=mode)


def main() -> None:
    folder = sys.argv[1]
    os.makedirs(folder)
    for number in range(1, 20):
        layer = Layer(f"{folder}/{number:02}.tar")
        if number == 1:
            for name in ("layers", "shared", "gone", "gone/deep", "opaque", "opaque/old", "odd", "links", "kinds"):
                layer.folder(name)
        layer.add(f"layers/{number}", data=str(number).encode())
        # Replaced by every layer: the last one is seen.
        layer.add("shared/replaced", data=f"by layer {number}".encode(), mode=0o600 + number)
        if number == 2:
            for name in ODD_NAMES:
                layer.add(f"odd/{name}", data=name.encode())
        if number == 3:
            layer.add("gone/file", data=b"removed by layer 4")
            layer.add("gone/deep/file", data=b"removed with its folder by layer 5")
            layer.add("opaque/old/file", data=b"hidden by layer 6")
            layer.add("opaque/hidden", data=b"hidden by layer 6")
        if number == 4:
            layer.add("gone/.wh.file")
        if number == 5:
            layer.add("gone/.wh.deep")
        if number == 6:
            layer.folder("opaque")
            layer.add("opaque/.wh..wh..opq")
            layer.add("opaque/new", data=b"only this one")
        if number == 7:
            layer.add("links/one", data=b"three names")
            layer.add("links/two", tarfile.LNKTYPE, linkname="links/one")
            layer.add("links/three", tarfile.LNKTYPE, linkname="links/one")
            layer.add("links/relative", tarfile.SYMTYPE, linkname="../layers/1")
            layer.add("links/absolute", tarfile.SYMTYPE, linkname="/layers/2")
            layer.add("links/dangling", tarfile.SYMTYPE, linkname="/nowhere")
            layer.add("links/outside", tarfile.SYMTYPE, linkname="../../../../etc/passwd")
        if number == 8:
            layer.add("kinds/fifo", tarfile.FIFOTYPE, mode=0o620)
            layer.add("kinds/null", tarfile.CHRTYPE, mode=0o666, devmajor=1, devminor=3)
            layer.add("kinds/setuid", mode=0o4755, uid=1000, gid=1000)
            layer.add("kinds/sticky", tarfile.DIRTYPE, mode=0o1777)
            layer.add("kinds/empty")
        if number == 9:
            layer.add("kinds/xattr", pax_headers={"SCHILY.xattr.user.colour": "blue"})
        if number == 10:  # a file becomes a folder, a folder a file
            layer.add("shared/file-then-folder", data=b"a file")
            layer.folder("shared/folder-then-file")
            layer.add("shared/folder-then-file/inside")
        if number == 11:
            layer.add("shared/.wh.file-then-folder")
            layer.add("shared/.wh.folder-then-file")
        if number == 12:
            layer.folder("shared/file-then-folder")
            layer.add("shared/file-then-folder/inside")
            layer.add("shared/folder-then-file", data=b"a file now")
        if number == 13:  # comes back after its removal
            layer.add("gone/file", data=b"back again")
        layer.tar.close()


if __name__ == "__main__":
    main()
