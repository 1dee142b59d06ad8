//! OpenSlide's C functions, loaded at run time.
//!
//! A drop-in for the crate `openslide-sys`: [`sys`] has the same items, so `openslide-rs` builds on it unchanged, but
//! nothing is linked. [`load`] names the library to take; without it the first call looks at `OPENSLIDE_LIBRARY` and
//! then where the system keeps libraries. OpenSlide 3.4.1 lacks the functions of 4.x (caches, ICC profiles): they then
//! report "none" instead of failing. Without any library every call reports failure in the function's own way
//! (null, -1), so that `openslide_open` is the call that fails.

use std::ffi::{OsStr, OsString};
use std::sync::OnceLock;

static API: OnceLock<Result<sys::Api, String>> = OnceLock::new();

/// Names tried in turn when no library was named: OpenSlide 4 and 3, as their packages install them.
const SYSTEM_NAMES: [&str; 3] = ["libopenslide.so.1", "libopenslide.so.0", "libopenslide.so"];

/// Loads the library at `path` (or by a bare name, through the system's search) for the rest of the process.
///
/// # Errors
/// The loader's message, if it is no loadable OpenSlide. Once one library is loaded, later calls change nothing.
pub fn load(path: impl AsRef<OsStr>) -> Result<(), String> {
    API.get_or_init(|| sys::Api::open(path.as_ref())).as_ref().map(drop).map_err(Clone::clone)
}

fn api() -> Option<&'static sys::Api> {
    API.get_or_init(|| {
        let named = std::env::var_os("OPENSLIDE_LIBRARY");
        let names = named.map_or_else(|| SYSTEM_NAMES.map(OsString::from).to_vec(), |name| vec![name]);
        let mut problem = String::new();
        for name in names {
            match sys::Api::open(&name) {
                Ok(api) => return Ok(api),
                Err(error) => problem = error,
            }
        }
        Err(problem)
    })
    .as_ref()
    .ok()
}

/// The C interface, item by item as in the crate this one stands in for.
#[allow(non_camel_case_types, reason = "the names are OpenSlide's")]
#[allow(clippy::missing_safety_doc, reason = "each function's contract is OpenSlide's own documentation")]
pub mod sys {
    use super::api;
    use libloading::Library;
    use std::ffi::{OsStr, c_char, c_void};

    /// An open slide; only ever handled by pointer.
    #[repr(C)]
    pub struct openslide_t {
        _private: [u8; 0],
    }

    /// A tile cache; only ever handled by pointer.
    #[repr(C)]
    pub struct openslide_cache_t {
        _private: [u8; 0],
    }

    /// Writes, from one table, the struct of function pointers, its loader and the public functions.
    ///
    /// `required` functions exist in every OpenSlide since 3.4; `since_4` ones may be missing. The expression after
    /// `=>` is what a call returns where the function (or the library) is missing.
    macro_rules! functions {
        (
            required { $(fn $name:ident($($arg:ident: $ty:ty),*) $(-> $ret:ty)? => $missing:expr;)* }
            since_4 { $(fn $name4:ident($($arg4:ident: $ty4:ty),*) $(-> $ret4:ty)? => $missing4:expr;)* }
        ) => {
            pub(super) struct Api {
                $($name: unsafe extern "C" fn($($ty),*) $(-> $ret)?,)*
                $($name4: Option<unsafe extern "C" fn($($ty4),*) $(-> $ret4)?>,)*
                // Last, so that it is dropped after the pointers into it.
                _library: Library,
            }

            impl Api {
                pub(super) fn open(name: &OsStr) -> Result<Self, String> {
                    // SAFETY: OpenSlide's initialisers have no preconditions, and the signatures below are those of
                    // openslide.h, unchanged since 3.4.
                    unsafe {
                        let library = Library::new(name).map_err(|error| error.to_string())?;
                        Ok(Self {
                            $($name: *library
                                .get(concat!(stringify!($name), "\0").as_bytes())
                                .map_err(|error| error.to_string())?,)*
                            $($name4: library
                                .get(concat!(stringify!($name4), "\0").as_bytes())
                                .ok()
                                .map(|symbol| *symbol),)*
                            _library: library,
                        })
                    }
                }
            }

            $(
                /// See `openslide.h`.
                pub unsafe fn $name($($arg: $ty),*) $(-> $ret)? {
                    match api() {
                        // SAFETY: the caller upholds the C function's contract.
                        Some(api) => unsafe { (api.$name)($($arg),*) },
                        None => $missing,
                    }
                }
            )*
            $(
                /// See `openslide.h`; may be missing before OpenSlide 4.
                pub unsafe fn $name4($($arg4: $ty4),*) $(-> $ret4)? {
                    match api().and_then(|api| api.$name4) {
                        // SAFETY: the caller upholds the C function's contract.
                        Some(function) => unsafe { function($($arg4),*) },
                        None => $missing4,
                    }
                }
            )*
        };
    }

    use std::ptr::{null, null_mut};

    functions! {
        required {
            fn openslide_get_version() -> *const c_char => null();
            fn openslide_detect_vendor(filename: *const c_char) -> *const c_char => null();
            fn openslide_open(filename: *const c_char) -> *mut openslide_t => null_mut();
            fn openslide_close(osr: *mut openslide_t) => ();
            fn openslide_get_error(osr: *mut openslide_t) -> *const c_char => null();
            fn openslide_get_level_count(osr: *mut openslide_t) -> i32 => -1;
            fn openslide_get_level_dimensions(osr: *mut openslide_t, level: i32, w: *mut i64, h: *mut i64) => ();
            fn openslide_get_level_downsample(osr: *mut openslide_t, level: i32) -> f64 => -1.0;
            fn openslide_get_best_level_for_downsample(osr: *mut openslide_t, downsample: f64) -> i32 => -1;
            fn openslide_read_region(
                osr: *mut openslide_t, dest: *mut u32, x: i64, y: i64, level: i32, w: i64, h: i64
            ) => ();
            fn openslide_get_property_names(osr: *mut openslide_t) -> *const *const c_char => null();
            fn openslide_get_property_value(osr: *mut openslide_t, name: *const c_char) -> *const c_char => null();
            fn openslide_get_associated_image_names(osr: *mut openslide_t) -> *const *const c_char => null();
            fn openslide_get_associated_image_dimensions(
                osr: *mut openslide_t, name: *const c_char, w: *mut i64, h: *mut i64
            ) => ();
            fn openslide_read_associated_image(osr: *mut openslide_t, name: *const c_char, dest: *mut u32) => ();
        }
        since_4 {
            fn openslide_get_icc_profile_size(osr: *mut openslide_t) -> i64 => 0;
            fn openslide_read_icc_profile(osr: *mut openslide_t, dest: *mut c_void) => ();
            fn openslide_get_associated_image_icc_profile_size(
                osr: *mut openslide_t, name: *const c_char
            ) -> i64 => 0;
            fn openslide_read_associated_image_icc_profile(
                osr: *mut openslide_t, name: *const c_char, dest: *mut c_void
            ) => ();
            fn openslide_cache_create(capacity: usize) -> *mut openslide_cache_t => null_mut();
            fn openslide_cache_release(cache: *mut openslide_cache_t) => ();
            fn openslide_set_cache(osr: *mut openslide_t, cache: *mut openslide_cache_t) => ();
        }
    }
}
