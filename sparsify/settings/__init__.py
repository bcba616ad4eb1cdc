"""Settings: frozen configs, strict YAML, the command line, secrets. Imports nothing heavy."""
