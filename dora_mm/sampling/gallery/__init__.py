"""Galleries: a folder with one HTML page and its images, made from the manifests of runs, that opens from disk."""

from dora_mm.sampling.gallery.folder import GALLERY, INDEX, fill_gallery, update_page, write_gallery
from dora_mm.sampling.gallery.training import read_images

__all__ = ["GALLERY", "INDEX", "fill_gallery", "read_images", "update_page", "write_gallery"]
