"""The evaluation suite of perl-vlm. At present it has no modules: a run is evaluated by perl_vlm.train.evaluate."""
