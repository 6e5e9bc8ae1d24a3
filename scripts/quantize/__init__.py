"""Round a checkpoint to four or eight bits; README.md is the lesson, __main__.py the command."""
