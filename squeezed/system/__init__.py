"""What the system gives: places for files, forks, and its failures as errors of ours."""
