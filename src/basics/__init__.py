"""What may everyone use? Durable writes, words on a screen, the host's resources."""
