"""The only code that touches the machine: files, processes, sockets, service managers, disks, clocks."""
