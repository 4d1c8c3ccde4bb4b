"""Galleries: a folder with one HTML page and its pictures, made from the manifests of runs, that opens from disk."""

from dora_mm.sampling.gallery.folder import write_gallery

__all__ = ["write_gallery"]
