"""The numbers of docs/studies/paper.md, computed from committed rows."""
