"""Folders of captioned images: reading, aspect-ratio buckets, pixels and cached latents; frames of videos."""
