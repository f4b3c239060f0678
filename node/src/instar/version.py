"""The version of this build. The build writes its own copy of this file into the program."""

VERSION = "1.0.0"
