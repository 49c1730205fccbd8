"""From the folders of runs to a leaderboard: JSON, Markdown and one static page."""

from purify.leaderboard.rows import Row, read_run
from purify.leaderboard.write import write_leaderboard

__all__ = ["Row", "read_run", "write_leaderboard"]
