"""Published schedules, a module for each family of them; `jaxpipe.schedules.registry` lists all."""
