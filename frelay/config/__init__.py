"""The route file: it is read, checked, compared and watched here.

``model``         the frozen types that the rest of frelay works with
``load``          turns a TOML file (and ``routes_dir``) into a :class:`~frelay.config.model.Config`, or reports every
                  problem at once; ``document``, ``values`` and ``rules`` are its parts
``line_numbers``  finds the line of each key in a TOML document, for error messages
``dump``          writes a configuration as plain data, and reads that again
``plan``          compares the running and the new configuration, and says what a reload has to do; pure
``route_files``   writes the files of ``routes_dir``
``watch``         waits until the content of a configuration's files has changed

Import from the modules. Nothing is re-exported here, so that ``load`` and ``plan`` stay the names of modules, and a
program that only reads a route file does not load Trio.
"""
