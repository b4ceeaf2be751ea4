"""To the cloud and back: connection, channel, retries, steps."""
