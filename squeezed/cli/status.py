"""Exit statuses of the command, besides 0."""

USAGE_STATUS = 2
FAULT_STATUS = 1
INTERRUPTED_STATUS = 130
