"""Small versions of large images; those of an earlier gallery serve again."""

import hashlib
from pathlib import Path

from PIL import Image, ImageOps

from dora_mm.utils.folders import link_or_copy
from dora_mm.utils.lock import make_folder

SIDE = 512  # pixels of a thumbnail's longer side: sharp on a screen of twice the density; some 25 kB


class Thumbnails:
    """The folder of the thumbnails of a gallery.

    Args:
        folder: The folder, which need not exist yet.
        earlier: That of the gallery which this one replaces.
    """

    def __init__(self, folder: Path, earlier: Path):
        self.folder, self.earlier = folder, earlier

    def path(self, source: Path) -> Path:
        """The path of the thumbnail of an image in its current state, made or not; call it before the image is read."""
        about = source.stat()  # not its ctime: links to the image change it, which galleries make and remove
        text = f"{source.resolve()} {about.st_mtime_ns} {about.st_size}"
        digest = hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()
        return self.folder / f"{digest[:16]}.webp"

    def has(self, path: Path) -> bool:
        """Takes over a thumbnail from the earlier gallery; False: it has none of the image as it is."""
        kept = self.earlier / path.name
        if kept.is_file() and not path.exists():
            link_or_copy(kept, path)
        return kept.is_file()

    def add(self, path: Path, image: Image.Image) -> None:
        """Saves the thumbnail of an image.

        Args:
            path: Where it will be.
            image: The pixels of the image.
        """
        try:
            upright = ImageOps.exif_transpose(image)
        except Exception:  # damaged EXIF, which browsers ignore, too: struct.error, TypeError, SyntaxError and more
            upright = image
        small = upright.convert("RGBA" if image.has_transparency_data else "RGB")
        small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=2.0)
        make_folder(self.folder)
        small.save(path, "WEBP", quality=82, method=2)
