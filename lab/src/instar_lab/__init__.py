"""The lab: demo, simulated fleet, broken programs and the build of real ones. Never shipped to a node."""
