"""`shoal serve`: the launcher, its supervisor process, start-up logs and the banner."""
