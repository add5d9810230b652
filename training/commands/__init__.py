"""The subcommands of `vreflection`, a file each: `add_parser` adds it to the command line and sets what it runs."""
