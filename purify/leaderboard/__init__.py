"""From the folders of runs to a leaderboard: JSON, Markdown and one static page."""

from purify.leaderboard.certified import CertifiedRow, read_certified
from purify.leaderboard.rows import Row, read_run
from purify.leaderboard.write import read_runs, write_leaderboard

__all__ = ["CertifiedRow", "Row", "read_certified", "read_run", "read_runs", "write_leaderboard"]
