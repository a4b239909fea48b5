"""Music by rules, rendered, with its truth, and what measures that truth in audio."""
