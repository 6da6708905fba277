"""Training float networks from scratch: what the pretraining recipes share."""
