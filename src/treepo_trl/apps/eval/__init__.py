"""What `treepo-trl eval` is made of: its options, its data, scores of samples, the table and the folder."""
