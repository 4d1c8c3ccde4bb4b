"""Questions made from WordNet."""
