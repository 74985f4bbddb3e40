# Aliases of what is in scripts/, which works without make. Arguments: make test ARGS="-k ledger"
COMMANDS := $(filter-out %.sh %.py,$(notdir $(wildcard scripts/*)))

.PHONY: help $(COMMANDS)

help:
	@for command in $(COMMANDS); do printf 'make %-10s %s\n' "$$command" "$$(sed -n '2s/^# //p' scripts/$$command)"; done

$(COMMANDS):
	@scripts/$@ $(ARGS)
