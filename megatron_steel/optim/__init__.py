"""Parameter groups, optimizer, schedules."""
