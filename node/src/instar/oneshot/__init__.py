"""One-shot children of the updater and the installer: the only code on a node that loads TUF."""
