# Aliases of the commands in scripts/, which work without make; its .sh and .py files help them. Arguments: make test ARGS="-k ledger"
COMMANDS := $(sort $(filter-out %.sh %.py __pycache__,$(notdir $(wildcard scripts/*))))

.PHONY: help $(COMMANDS)

help:
	@for command in $(COMMANDS); do printf 'make %-12s %s\n' "$$command" "$$(sed -n '2s/^# //p' scripts/$$command)"; done

$(COMMANDS):
	@scripts/$@ $(ARGS)
