"""Start-up check, heartbeat, progress, signals, restarts, stragglers."""
