# The commands a person types. Each sets up what it needs (Debian packages, kernel, images) and says so.

.PHONY: demo test soak bench dist check images kvm-host clean

demo: dist images                   ## run a pod and show it
	tests/demo/run

test: dist images                   ## the tests, on both engines
	tests/run

soak: dist images                   ## pods come and go for an hour, and nothing grows
	tests/load/run

bench: dist images                  ## the measure beside runc and other peers
	tests/bench/run

dist:                               ## build everything into target/bulkhead
	setup/packages
	setup/dist

images:                             ## test images from Debian packages
	tests/images/build

kvm-host:                           ## the virtual machine in which the kvm engine is tested
	tests/kvm-host/build

check: dist                         ## what this host can run
	target/bulkhead/bulkhead check

clean:                              ## build products in the tree; the cache folder stays
	cargo clean
