//! What work takes beside time: memory, processor time, and how busy GPUs are and what power they draw.

use sysinfo::{Pid, ProcessRefreshKind, ProcessesToUpdate, System};

pub(super) use crate::engine::gpus::{Seen, used_device_bytes, watched, watched_since};
pub(super) use crate::engine::memory::{forget_peak as forget_peak_host_bytes, peak as peak_host_bytes};

/// Processor time of this process so far in seconds, over all threads.
pub(super) fn cpu_secs() -> Option<f64> {
    let own = Pid::from_u32(std::process::id());
    let mut system = System::new().ok()?;
    system.refresh_processes_specifics(ProcessesToUpdate::Some(&[own]), true, ProcessRefreshKind::nothing().with_cpu());
    system.process(own).map(|process| process.accumulated_cpu_time() as f64 / 1e3)
}

/// Memory that can be had without swapping; `None` if the system does not tell.
pub(super) fn available_bytes() -> Option<u64> {
    let mut system = System::new().ok()?;
    system.refresh_memory();
    Some(system.available_memory()).filter(|bytes| *bytes > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(target_os = "linux")]
    #[test]
    fn the_system_tells_memory_and_time() {
        assert!(peak_host_bytes().unwrap() > 1 << 20);
        assert!(cpu_secs().is_some());
    }
}
