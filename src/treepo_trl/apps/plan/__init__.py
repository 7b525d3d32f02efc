"""`treepo-trl plan`: what a training would take of a card."""
