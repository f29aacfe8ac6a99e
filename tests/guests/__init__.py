"""Small real Linux guests as an export from VMware leaves them, and a way to boot them and watch their console."""
