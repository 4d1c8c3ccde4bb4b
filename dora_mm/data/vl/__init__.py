"""Vision-language data sets: readers of the published files, tables on disk, splits and mixing of tasks."""
