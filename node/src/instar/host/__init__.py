"""The only code that touches the machine: durable files, processes, sockets, service managers, disks, clocks."""
