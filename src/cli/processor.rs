//! Tells a processor on which the program would end without a word: one that lacks the instructions it was compiled for.

use std::io::Write as _;

/// Written as it is: putting it together, or handing it on, would take the very instructions.
const TOO_OLD: &[u8] = b"error: this program was compiled for processors with AVX2 and BMI2, which this one lacks
help: compile it on this machine by `RUSTFLAGS= cargo build --release`
";

/// Ends the program where `.cargo/config.toml` asked the compiler for more than this processor has.
pub(super) fn check() {
    if cfg!(target_feature = "avx2") && !has_avx2_and_bmi2() {
        std::io::stderr().write_all(TOO_OLD).ok();
        std::process::exit(1);
    }
}

/// By the processor's own word: `is_x86_feature_detected!` takes what the compiler was asked for as given.
#[cfg(target_arch = "x86_64")]
fn has_avx2_and_bmi2() -> bool {
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    const FEATURES: u32 = 7;
    const AVX2_AND_BMI2: u32 = 1 << 5 | 1 << 8;
    #[allow(unused_unsafe, reason = "newer compilers take the call for safe")]
    #[expect(unsafe_code, reason = "every x86-64 processor has the instruction")]
    // SAFETY: as above.
    unsafe {
        __cpuid(0).eax >= FEATURES && __cpuid_count(FEATURES, 0).ebx & AVX2_AND_BMI2 == AVX2_AND_BMI2
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn has_avx2_and_bmi2() -> bool {
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    #[test]
    fn the_processor_says_what_the_system_says() {
        let system = std::fs::read_to_string("/proc/cpuinfo").unwrap();
        let flags = system.lines().find(|line| line.starts_with("flags")).unwrap();
        let has = |name| flags.split_whitespace().any(|flag| flag == name);
        assert_eq!(has_avx2_and_bmi2(), has("avx2") && has("bmi2"));
    }
}
