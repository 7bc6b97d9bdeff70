"""The route file: read, judged, compared and watched.

``model``   the frozen types that the rest of frelay works with
``load``    a TOML file (and ``routes_dir``) to a :class:`~frelay.config.model.Config`, or every problem at once
``locate``  the line on which each key of a TOML document stands
``plan``    (running configuration, new configuration) to what a reload has to do; pure
``watch``   waits until the content of a configuration's files has changed

Import from the modules. Nothing is re-exported here, so that ``load`` and ``plan`` stay the names of modules, and
whoever only reads a route file does not load Trio.
"""
