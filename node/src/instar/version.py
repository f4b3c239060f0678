"""The version of this build. The build writes its own copy of this file into the program."""

BUILT = ""  # when, ISO 8601 in UTC; '' when the build does not say
VERSION = "1.0.0"
