"""`treepo-trl completion`: a script that completes options."""
