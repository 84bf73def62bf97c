"""`python -m bitfit_hf.cli`, and `accelerate launch -m bitfit_hf.cli` for several processes."""

from . import app

app(prog_name="bitfit")
