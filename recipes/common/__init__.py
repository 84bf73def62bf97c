"""What the study recipes share: arguments, data, metrics, the training run and its record."""
