//! How the agent is linked.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    // 20,000 relocations of a program that may lie anywhere: packed, they are a few kilobytes of the initramfs in place of half a megabyte.
    println!("cargo::rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
}
