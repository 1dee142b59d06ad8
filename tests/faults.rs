//! What can go wrong, done on purpose: a clear message that names the file, the right exit code, no panic, and nothing
//! left that looks finished.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use slidestream::slide::synthetic::{MppField, SvsOptions, SyntheticSlide};

use support::{
    Finished, Json, Kind, TiffMap, Workplace, assert_failed, assert_no_partial_files, assert_no_results_of,
    assert_same_results, edit, files, has_partial_file, is_root, results, small, table, truncated, two_pieces,
    with_mpp,
};

/// Runs the classifier over one bad slide, which must fail as the only one, and returns what was said.
#[track_caller]
fn fails(place: &Workplace, slide: &Path, error: &str) -> Finished {
    let id = slide.file_stem().unwrap().to_str().unwrap();
    let out = place.at(&format!("out-{id}"));
    let finished = place.run(&place.model(Kind::Classifier), &[slide], &out, &[]).code(1);
    assert_failed(&out, id, error);
    let name = slide.file_name().unwrap().to_str().unwrap();
    finished.says(&["error: ", name, error])
}

#[test]
fn a_truncated_slide_is_told_wherever_it_ends() {
    let place = Workplace::new();
    let whole = place.slide("whole.svs", &small(), &SvsOptions::default());
    for percent in [1, 10, 50, 99] {
        let cut = place.at(&format!("cut{percent}.svs"));
        truncated(&whole, &cut, percent);
        fails(&place, &cut, "truncated: its index lies at byte").says(&["help: copy the file again"]);
    }
}

/// Applies `change` to the bytes of every level-0 tile.
fn damage_tiles(path: &Path, change: impl Fn(&mut [u8])) {
    edit(path, |bytes| {
        for tile in TiffMap::of(bytes).directories[0].tiles(bytes) {
            change(&mut bytes[tile]);
        }
    });
}

#[test]
fn zero_filled_tile_data_fails_the_slide() {
    let place = Workplace::new();
    let slide = place.slide("zeroed.svs", &small(), &SvsOptions::default());
    damage_tiles(&slide, |tile| tile.fill(0));
    fails(&place, &slide, "can't be read").says(&["help: ", "on_tile_error"]);
}

#[test]
fn broken_jpeg_tables_fail_the_slide() {
    let place = Workplace::new();
    let slide = place.slide("tables.svs", &small(), &SvsOptions::default());
    damage_tiles(&slide, |tile| {
        // The lengths of the codes of the first Huffman table: more codes than there can be.
        let table = tile.windows(2).position(|bytes| bytes == [0xff, 0xc4]).unwrap();
        tile[table + 5..table + 21].fill(0xff);
    });
    fails(&place, &slide, "can't be read").says(&["help: ", "on_tile_error"]);
}

#[test]
fn a_slide_without_lower_levels_is_read_from_level_0() {
    let place = Workplace::new();
    let flat = place.slide("flat.svs", &small(), &SvsOptions { downsamples: vec![1], ..SvsOptions::default() });
    let cut = place.slide("cut.svs", &small(), &SvsOptions::default());
    // As if the other directories had never been written.
    edit(&cut, |bytes| {
        let next_at = TiffMap::of(bytes).directories[0].next_at;
        bytes[next_at..next_at + 4].fill(0);
    });
    let model = place.model_with(Kind::Classifier, "mpp = 0.5", "mpp = 2.0");
    let out = place.at("out");
    place.run(&model, &[&flat, &cut], &out, &[]).code(0);
    for id in ["flat", "cut"] {
        let record = Json::of_slide(&out, id);
        assert_eq!((&record["reading"]["level"], &record["reading"]["resampled"]), (&0.into(), &true.into()));
        assert_eq!(record["reading"]["effective_mpp"][0], 2.0);
        assert!(record.coverage().inferred > 0);
    }
}

#[test]
fn a_chain_of_levels_that_leads_nowhere_fails_the_slide() {
    let place = Workplace::new();
    let slide = place.slide("chain.svs", &small(), &SvsOptions::default());
    edit(&slide, |bytes| {
        let next_at = TiffMap::of(bytes).directories[0].next_at;
        bytes[next_at..next_at + 4].fill(0xfe);
    });
    fails(&place, &slide, "chain.svs: ");
}

#[test]
fn nonsense_resolutions_are_refused_with_the_way_out() {
    let place = Workplace::new();
    for (index, text) in ["0", "-0.5", "NaN", "inf", "1e9", "twenty"].into_iter().enumerate() {
        let slide = place.slide(&format!("mpp{index}.svs"), &small(), &with_mpp(MppField::Text(text.to_owned())));
        fails(&place, &slide, "no believable resolution").says(&["help: ", "slide_mpp"]);
    }
}

#[test]
fn files_that_are_no_slides_are_told_as_what_they_are() {
    let place = Workplace::new();
    let text = place.write("notes.svs", "slides of the second week\n");
    fails(&place, &text, "a text file");
    fails(&place, &place.write("empty.svs", ""), "an empty file");
    let png = place.at("picture.tif");
    image::RgbImage::new(8, 8).save_with_format(&png, image::ImageFormat::Png).unwrap();
    fails(&place, &png, "a PNG image");
}

#[test]
fn an_empty_folder_is_a_wrong_command_line() {
    let place = Workplace::new();
    fs::create_dir(place.at("nothing")).unwrap();
    let out = place.at("out");
    let finished = place.run(&place.model(Kind::Classifier), &[&place.at("nothing")], &out, &[]).code(2);
    finished.says(&["error: ", "nothing: no slide in this folder", "help: "]);
    let finished = place.run(&place.model(Kind::Classifier), &[&place.at("typo.svs")], &out, &[]).code(2);
    finished.says(&["error: ", "typo.svs: no such file or folder"]);
    assert!(!out.exists());
}

#[test]
fn a_folder_below_a_file_can_be_neither_read_nor_written() {
    let place = Workplace::new();
    let slide = place.slide("a.svs", &small(), &SvsOptions::default());
    let model = place.model(Kind::Classifier);
    let below = slide.join("out");
    place.run(&model, &[&slide], &below, &[]).code(1).says(&["error: ", "a.svs/out: can't be written", "help: "]);
    // In a list a slide's path is looked at when its turn comes.
    let list = place.write("list.csv", "slide\na.svs/b.svs\na.svs\n");
    let out = place.at("out");
    place.run(&model, &[&list], &out, &[]).code(3).says(&["a.svs/b.svs: can't be read"]);
    assert_failed(&out, "b", "a.svs/b.svs: can't be read");
}

/// A command that runs as a user for whom permissions count.
fn as_nobody(command: &Command) -> Command {
    let (program, first): (&str, &[&str]) =
        if is_root() { ("setpriv", &["--reuid=65534", "--regid=65534", "--clear-groups"]) } else { ("env", &[]) };
    let mut other = Command::new(program);
    other.args(first).arg(command.get_program()).args(command.get_args());
    other.current_dir(command.get_current_dir().unwrap());
    other
}

#[cfg(unix)]
#[test]
fn missing_permissions_are_told() {
    use std::os::unix::fs::PermissionsExt as _;

    let place = Workplace::new();
    let allow = |path: &Path, mode: u32| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    let slide = place.slide("cohort/a.svs", &small(), &SvsOptions::default());
    let closed = place.slide("cohort/closed/b.svs", &small(), &SvsOptions::default()).parent().unwrap().to_owned();
    let secret = place.slide("secret.svs", &small(), &SvsOptions::default());
    let model = place.model(Kind::Classifier);
    let (out, read_only) = (place.at("out"), place.at("read-only"));
    fs::create_dir_all(&out).unwrap();
    fs::create_dir_all(&read_only).unwrap();
    for (path, mode) in [(&place.at(""), 0o755), (&out, 0o777), (&read_only, 0o555), (&secret, 0o000)] {
        allow(path, mode);
    }
    allow(&closed, 0o000);
    let run = |slide: &Path, out: &Path| {
        let command = place.run_command(&model, &[slide], out, &[]);
        place.start(&mut as_nobody(&command)).wait()
    };
    // A folder that can't be searched may hold slides: it is not left out in silence.
    let finished = run(&place.at("cohort"), &out);
    allow(&closed, 0o755);
    finished.code(2).says(&["error: ", "cohort/closed", "Permission denied", "help: make the folder readable"]);
    assert!(results(&out).is_empty());
    run(&slide, &read_only).code(1).says(&["error: ", "read-only", "Permission denied", "help: ", "`out`"]);
    assert!(files(&read_only).is_empty());
    run(&secret, &out).code(1).says(&["secret.svs: can't be read", "Permission denied", "help: let the user"]);
    assert_failed(&out, "secret", "secret.svs: can't be read");
    // The same user gets on where he may.
    run(&slide, &out).code(0);
}

/// A command none of whose files may grow beyond so many blocks of 512 bytes: writes then fail as on a full disk.
#[cfg(unix)]
fn with_little_space(command: &Command, blocks: u32) -> Command {
    let mut limited = Command::new("sh");
    // POSIX counts in 512 bytes, bash outside of its POSIX mode in 1024: half as many are meant there.
    let limit = format!(
        "trap '' XFSZ; if [ -n \"$BASH_VERSION\" ]; then set -o posix; fi; ulimit -f {blocks}; exec \"$0\" \"$@\""
    );
    limited.args(["-c", &limit]).arg(command.get_program()).args(command.get_args());
    limited.current_dir(command.get_current_dir().unwrap());
    limited
}

#[cfg(unix)]
#[test]
fn a_full_disk_fails_the_slide_and_leaves_nothing() {
    let place = Workplace::new();
    let slide = place.slide("a.svs", &two_pieces(), &SvsOptions::default());
    for (kind, flags, name) in [
        (Kind::Classifier, &["--emit", "geojson", "--tissue", "none"][..], "a.geojson"),
        (Kind::Segmentation, &["--emit", "tiff", "--tissue", "none"], ".tif"),
        (Kind::Classifier, &["--emit", "png"], "a.png"),
        (Kind::Features, &["--emit", "h5", "--tissue", "none", "--overlap", "75%"], "a.h5"),
    ] {
        let model = place.model(kind);
        let out = place.at(&format!("out-{kind:?}-{}", flags[1]));
        let command = place.run_command(&model, &[&slide], &out, flags);
        place.start(&mut with_little_space(&command, 24)).wait().code(1).says(&["error: ", name, "help: "]);
        assert_failed(&out, "a", name);
        // With space again, the same command completes the work.
        place.run(&model, &[&slide], &out, flags).code(0).says(&["done again: it was failed"]);
        assert_eq!(Json::of_slide(&out, "a")["status"], "done");
    }
}

#[cfg(unix)]
#[test]
fn no_space_for_the_account_ends_the_run() {
    let place = Workplace::new();
    let slide = place.slide("a.svs", &small(), &SvsOptions::default());
    let out = place.at("out");
    let command = place.run_command(&place.model(Kind::Classifier), &[&slide], &out, &[]);
    place.start(&mut with_little_space(&command, 1)).wait().code(1).says(&["error: ", "run.json: can't be written"]);
    assert!(!out.join("run.json").exists());
    assert_no_results_of(&out, "a");
}

/// Slides and flags of a run of some seconds.
fn long_run(place: &Workplace) -> (PathBuf, [PathBuf; 2]) {
    let slide = place.slide("a.svs", &small(), &SvsOptions::default());
    let copy = place.at("b.svs");
    fs::copy(&slide, &copy).unwrap();
    (place.model(Kind::Slow), [slide, copy])
}

#[test]
fn a_killed_run_leaves_nothing_that_looks_finished_and_can_go_on() {
    let place = Workplace::new();
    let (model, slides) = long_run(&place);
    let slides = slides.each_ref().map(PathBuf::as_path);
    let (out, whole) = (place.at("out"), place.at("whole"));
    let mut run = place.start(&mut place.run_command(&model, &slides, &out, &["--sessions", "1"]));
    run.until("the second slide is at work", || {
        out.join("slides/a.json").exists() && has_partial_file(&out.join("model-outputs-csv"))
    });
    run.signal("KILL");
    assert_eq!(run.wait().code, None);
    assert!(!out.join("slides/b.json").exists(), "the run was too fast to be killed in the middle");
    let is_of_b = |name: &String| name.contains("/b.");
    assert_eq!(results(&out).into_keys().find(|name| is_of_b(name) && !name.ends_with(".partial")), None);
    assert_eq!(Json::read(out.join("run.json"))["status"], "running");

    let again = place.run(&model, &slides, &out, &[]).code(0);
    again.says(&["a: was done before"]);
    assert_no_partial_files(&out);
    place.run(&model, &slides, &whole, &[]).code(0);
    assert_same_results(&out, &whole);
}

#[test]
fn two_runs_into_the_same_folder_do_not_mix() {
    let place = Workplace::new();
    let (model, slides) = long_run(&place);
    let out = place.at("out");
    let mut first = place.start(&mut place.run_command(&model, &[&slides[0]], &out, &["--sessions", "1"]));
    first.until("the first run is at work", || out.join("run.json").exists());
    let second = place.run(&model, &[&slides[1]], &out, &[]).code(1);
    second.says(&["error: ", "out: another run is writing to this folder (process ", "help: wait for it to end"]);
    assert!(!out.join("slides/b.json").exists());
    first.wait().code(0);
    assert_eq!(Json::of_slide(&out, "a")["status"], "done");
    // Whoever comes after finds the folder free.
    place.run(&model, &[&slides[1]], &out, &[]).code(0);
}

#[test]
fn models_that_cannot_work_are_refused_before_any_slide() {
    let place = Workplace::new();
    let slide = place.slide("a.svs", &small(), &SvsOptions::default());
    let out = place.at("out");
    let refuse = |model: &Path, texts: &[&str]| {
        place.run(model, &[&slide], &out, &[]).code(1).says(texts);
        assert!(!out.exists() || results(&out).is_empty());
        assert!(!out.join("slides").exists());
    };
    refuse(&place.model(Kind::FourChannels), &["model.onnx: input image", "[n, 3, h, w]"]);
    refuse(&place.at("nowhere"), &["nowhere: can't be read"]);
    fs::create_dir(place.at("bare")).unwrap();
    refuse(&place.at("bare"), &["bare: holds no card.toml", "help: "]);

    let text = place.model(Kind::Classifier);
    fs::write(text.join("model.onnx"), "weights: see the shared drive\n").unwrap();
    refuse(&text, &["model.onnx: is no ONNX model but text"]);
    let cut = place.model(Kind::Classifier);
    edit(&cut.join("model.onnx"), |bytes| bytes.truncate(bytes.len() / 2));
    refuse(&cut, &["model.onnx: is damaged or truncated", "help: fetch the file again"]);
    let changed = place.model(Kind::Classifier);
    fs::copy(place.model(Kind::Features).join("model.onnx"), changed.join("model.onnx")).unwrap();
    refuse(&changed, &["model.onnx: has sha256", "help: restore the file"]);
    fs::remove_file(changed.join("model.onnx")).unwrap();
    refuse(&changed, &["model.onnx: can't be read"]);
}

#[test]
fn a_card_that_contradicts_its_model_is_refused_with_the_key() {
    let place = Workplace::new();
    let slide = place.slide("a.svs", &small(), &SvsOptions::default());
    let pale = "{ name = \"pale\", color = \"#e8e8e8\" }";
    for (kind, from, to, key) in [
        (Kind::Classifier, "tile_size = 128", "tile_size = 256", "`tile_size` contradicts the model: "),
        (Kind::Classifier, pale, &format!("{pale}, {{ name = \"x\", color = \"#000000\" }}"), "`classes` contradicts"),
        (Kind::Classifier, "task = \"classification\"", "task = \"segmentation\"", "`task` contradicts the model: "),
        (Kind::Classifier, "mpp = 0.5", "mpp = -1.0", "`mpp` is "),
        (Kind::Classifier, "mpp = 0.5", "mp = 0.5", "unknown field `mp`"),
        (Kind::Segmentation, "tile_size = 128", "tile_size = 64", "`tile_size` contradicts the model: "),
    ] {
        let model = place.model_with(kind, from, to);
        let out = place.at("out");
        place.run(&model, &[&slide], &out, &[]).code(1).says(&["card.toml: ", key]);
        assert!(!out.exists());
    }
}

#[test]
fn a_static_batch_of_one_gives_the_same_results() {
    let place = Workplace::new();
    let slide = place.slide("a.svs", &small(), &SvsOptions::default());
    let (one, any) = (place.at("one"), place.at("any"));
    place.run(&place.model(Kind::OneAtATime), &[&slide], &one, &["--batch-size", "8"]).code(0);
    place.run(&place.model(Kind::Classifier), &[&slide], &any, &["--batch-size", "8"]).code(0);
    assert_eq!(table(&one.join("model-outputs-csv/a.csv")).len(), 30);
    assert_same_results(&one, &any);
}

#[test]
fn three_bad_slides_of_forty_do_not_stop_the_others() {
    let place = Workplace::new();
    let good = place.slide("slides/s00.svs", &SyntheticSlide::new(400, 300, 5), &SvsOptions::default());
    let mut list = "slide\n".to_owned();
    for index in 0..40 {
        let path = place.at(&format!("slides/s{index:02}.svs"));
        match index {
            0 => {}
            7 => drop(place.write("slides/s07.svs", "not a slide")),
            21 => truncated(&good, &path, 50),
            // Named in the list, but not there.
            33 => {}
            _ => drop(fs::copy(&good, &path).unwrap()),
        }
        list += &format!("slides/s{index:02}.svs\n");
    }
    let list = place.write("list.csv", list);
    let out = place.at("out");
    let model = place.model(Kind::Classifier);
    let finished = place.run(&model, &[&list], &out, &["--emit", "csv"]).code(3);
    finished.says(&["s07.svs", "s21.svs", "s33.svs"]).shows(&["40 slides: 37 done, 3 failed"]);
    assert_failed(&out, "s07", "a text file");
    assert_failed(&out, "s21", "truncated");
    assert_failed(&out, "s33", "no such file");
    assert_eq!(results(&out).len(), 37);
    assert_eq!(Json::read(out.join("run.json"))["slides"]["failed"], 3);
    let rows = fs::read_to_string(out.join("process_list.csv")).unwrap();
    assert_eq!(rows.lines().filter(|line| line.contains(",done,")).count(), 37);
    assert_eq!(rows.lines().filter(|line| line.contains(",failed,")).count(), 3);

    // Put right, only the three are done.
    for index in [7, 21, 33] {
        fs::copy(&good, place.at(&format!("slides/s{index:02}.svs"))).unwrap();
    }
    let finished = place.run(&model, &[&list], &out, &["--emit", "csv"]).code(0);
    finished.shows(&["40 slides: 3 done, 0 failed, 37 done before"]);
    assert_eq!(results(&out).len(), 40);
}
