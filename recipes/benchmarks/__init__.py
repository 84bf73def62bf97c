"""What a training step and serving cost beside their peers: `training.py` and `serving.py`, and their parts."""
